(() => {
  const root = document.currentScript.closest('.explorer');
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const names = Object.keys(data.controls);
  const SVG = 'http://www.w3.org/2000/svg';
  const dark = new Set(['forward', 'weight', 'parameters', 'compute', 'collective', 'mine', 'whole']);
  const left = 190, width = 900, row = 30;

  const make = (parent, tag, attributes, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  };

  const values = () => names.map(
    (name, i) => data.controls[name][Number(root.querySelectorAll('input')[i].value)]);

  function draw() {
    const chosen = values();
    root.querySelectorAll('output').forEach((node, i) => { node.textContent = chosen[i]; });
    const scene = data.scenes[data.keys[JSON.stringify(chosen)]];
    const picture = root.querySelector('.picture');
    picture.replaceChildren();
    root.querySelector('.said').textContent = scene.said;
    if (!scene.lanes.length) return;
    const height = row * scene.lanes.length + 56;
    const svg = make(picture, 'svg', {viewBox: `0 0 ${left + width} ${height}`, role: 'img',
      'aria-label': scene.said});
    const end = Math.max(...scene.boxes.map(b => b[1] + b[2]));
    scene.lanes.forEach((lane, i) => make(svg, 'text',
      {x: left - 8, y: i * row + 20, 'text-anchor': 'end', 'font-size': 13}, lane));
    for (const [lane, start, length, kind, text] of scene.boxes) {
      const x = left + start / end * width, w = length / end * width, name = scene.kinds[kind];
      make(svg, 'rect', {x, y: lane * row + 2, width: Math.max(w - 1, .3), height: row - 5,
        fill: data.colours[name]});
      if (w > 7 * text.length) make(svg, 'text', {x: x + w / 2, y: lane * row + 20,
        'text-anchor': 'middle', 'font-size': 12, fill: dark.has(name) ? '#fff' : '#000'}, text);
    }
    make(svg, 'text', {x: left, y: height - 34, 'font-size': 12},
      `0 to ${Number(end.toPrecision(4))} ${scene.unit}`);
    scene.kinds.forEach((kind, i) => {
      make(svg, 'rect', {x: left + i * 130, y: height - 22, width: 14, height: 14,
        fill: data.colours[kind]});
      make(svg, 'text', {x: left + 20 + i * 130, y: height - 10, 'font-size': 13}, kind);
    });
  }

  data.keys = Object.fromEntries(
    Object.keys(data.scenes).map(key => [JSON.stringify(JSON.parse(key)), key]));
  const controls = root.querySelector('.controls');
  names.forEach((name, i) => {
    const label = document.createElement('label');
    const text = document.createElement('span'), input = document.createElement('input');
    const output = document.createElement('output');
    text.textContent = name.replaceAll('_', ' ');
    Object.assign(input, {type: 'range', min: 0, max: data.controls[name].length - 1, step: 1,
      value: data.controls[name].indexOf(data.first[i])});
    input.addEventListener('input', draw);
    label.append(text, input, output);
    controls.appendChild(label);
  });
  draw();
})();
