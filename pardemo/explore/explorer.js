(() => {
  const root = document.currentScript.closest('.pardemo-explorer');
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const names = Object.keys(data.controls);
  const SVG = 'http://www.w3.org/2000/svg';
  const left = 190, width = 900, row = 30;
  // ids are unique on the page, whatever else is on it and however often this explorer is
  const all = [...document.querySelectorAll('.pardemo-explorer')];
  const prefix = `pardemo-${root.dataset.explorer}-${all.indexOf(root)}`;
  const strokes = {'//': 'M-2,2 l4,-4 M0,8 l8,-8 M6,10 l4,-4', '\\\\': 'M-2,6 l4,4 M0,0 l8,8 M6,-2 l4,4',
    'xx': 'M0,8 l8,-8 M0,0 l8,8', '++': 'M0,4 h8 M4,0 v8', '--': 'M0,4 h8', '||': 'M4,0 v8',
    '..': 'M3,4 h2'};

  const make = (parent, tag, attributes, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  };
  const write = (parent, x, y, size, text, more = {}) =>
    make(parent, 'text', {x, y, 'font-size': size, fill: 'currentColor', ...more}, text);

  const values = () => names.map(
    (name, i) => data.controls[name][Number(root.querySelectorAll('input')[i].value)]);

  function patterns(svg, kinds) {
    const defs = make(svg, 'defs', {});
    kinds.forEach((kind, i) => {
      const pattern = make(defs, 'pattern', {id: `${prefix}-${i}`, width: 8, height: 8,
        patternUnits: 'userSpaceOnUse'});
      make(pattern, 'rect', {width: 8, height: 8, fill: data.colours[kind]});
      const stroke = strokes[data.hatches[kind]];
      if (stroke) make(pattern, 'path', {d: stroke, stroke: '#fff', 'stroke-width': .8,
        'stroke-opacity': .7, fill: 'none'});
    });
    return kind => `url(#${prefix}-${kinds.indexOf(kind)})`;
  }

  function label(svg, x, y, kind, text) {  // on a patch of its own colour: no hatch through it
    const half = text.length * 3.6 + 2;
    make(svg, 'rect', {x: x - half, y: y - 11, width: 2 * half, height: 14,
      fill: data.colours[kind]});
    write(svg, x, y, 12, text, {'text-anchor': 'middle', fill: data.inks[kind]});
  }

  function draw() {
    const chosen = values();
    root.querySelectorAll('output').forEach((node, i) => { node.textContent = chosen[i]; });
    root.querySelectorAll('input').forEach(
      (node, i) => node.setAttribute('aria-valuetext', chosen[i]));
    const scene = data.scenes[data.keys[JSON.stringify(chosen)]];
    const picture = root.querySelector('.picture');
    picture.replaceChildren();
    root.querySelector('.said').textContent = scene.said;
    if (!scene.lanes.length) return;
    const height = row * scene.lanes.length + 56;
    const svg = make(picture, 'svg', {viewBox: `0 0 ${left + width} ${height}`, role: 'img',
      'aria-label': scene.said});
    const fill = patterns(svg, scene.kinds);
    const end = Math.max(...scene.boxes.map(b => b[1] + b[2]));
    scene.lanes.forEach((lane, i) => write(svg, left - 8, i * row + 20, 13, lane,
      {'text-anchor': 'end'}));
    for (const [lane, start, length, number, text] of scene.boxes) {
      const x = left + start / end * width, w = length / end * width, kind = scene.kinds[number];
      make(svg, 'rect', {class: 'box', x, y: lane * row + 2, width: Math.max(w - 1, .3),
        height: row - 5, fill: fill(kind)});
      if (text && w > 7 * text.length + 4) label(svg, x + w / 2, lane * row + 20, kind, text);
    }
    write(svg, left, height - 34, 12, `0 to ${Number(end.toPrecision(4))} ${scene.unit}`);
    scene.kinds.forEach((kind, i) => {
      make(svg, 'rect', {x: left + i * 130, y: height - 22, width: 14, height: 14,
        fill: fill(kind)});
      write(svg, left + 20 + i * 130, height - 10, 13, kind);
    });
  }

  data.keys = Object.fromEntries(
    Object.keys(data.scenes).map(key => [JSON.stringify(JSON.parse(key)), key]));
  const controls = root.querySelector('.controls');
  names.forEach((name, i) => {
    const line = document.createElement('label');
    const text = document.createElement('span'), input = document.createElement('input');
    const output = document.createElement('output');
    text.textContent = name.replaceAll('_', ' ');
    Object.assign(input, {type: 'range', min: 0, max: data.controls[name].length - 1, step: 1,
      value: data.controls[name].indexOf(data.first[i]), id: `${prefix}-${name}`});
    output.setAttribute('for', input.id);
    input.addEventListener('input', draw);
    line.append(text, input, output);
    controls.appendChild(line);
  });
  draw();
})();
