"""Bytes counted from what really ran, against what the wire factors say. Two real ranks on gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from pardemo.measure import count, volumes

N = 2
FLOAT = 4


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


PARAMETERS = 8 * 16 + 16 + 16 * 4 + 4


def every_collective():
    me, x = dist.get_rank(), torch.ones(6)
    parts = [torch.empty(6) for _ in range(N)]

    def step():
        dist.all_reduce(x.clone())  # moves 2(n-1)/n * 24 bytes
        dist.all_gather(parts, x)  # moves (n-1)/n * 48 bytes
        dist.all_gather_into_tensor(torch.empty(12), x)  # moves (n-1)/n * 48 bytes
        dist.reduce_scatter_tensor(torch.empty(3), x)  # moves (n-1)/n * 24 bytes (gloo: twice)
        dist.all_to_all_single(torch.empty(6), x)  # moves (n-1)/n * 24 bytes
        dist.broadcast(x.clone(), src=0)  # moves 24 bytes from rank 0
        dist.reduce(x.clone(), dst=0)  # moves 24 bytes from rank 1 (gloo: 12 from rank 0 besides)
        dist.gather(x, parts if me == 0 else None, dst=0)  # moves 24 bytes from rank 1
        dist.scatter(torch.empty(6), parts if me == 0 else None, src=0)  # moves 24 bytes from 0
        dist.barrier()  # moves no data
        if me == 0:
            dist.send(x, dst=1)  # moves 24 bytes
        else:
            dist.recv(torch.empty(6), src=0)  # moves 24 bytes

    return count(step)


def test_every_collective_is_counted_with_payload_and_sent_bytes(ranks2):
    zero, one = ranks2(every_collective)
    payload = {f.kind: f.payload_bytes for f in zero.flows}
    assert payload == {
        "all_reduce": 24, "all_gather": 96, "reduce_scatter": 24, "all_to_all": 24,
        "broadcast": 24, "reduce": 24, "gather": 48, "scatter": 48, "barrier": 0, "send": 24,
    }  # fmt: skip
    sent = {f.kind: f.sent_bytes for f in zero.flows}
    assert sent == {
        "all_reduce": 24, "all_gather": 48, "reduce_scatter": 24, "all_to_all": 12,
        "broadcast": 24, "reduce": 12, "gather": 0, "scatter": 24, "barrier": 0, "send": 24,
    }  # fmt: skip
    assert one.sent_bytes(kind="broadcast") == 0
    assert one.sent_bytes(kind="reduce") == 24
    assert one.sent_bytes(kind="gather") == 24
    assert one.sent_bytes(kind="scatter") == 0
    assert one.payload_bytes(kind="recv") == 24
    assert one.sent_bytes(kind="recv") == 0


def test_gloos_reduce_scatter_is_reported_by_name(ranks2):
    found = ranks2(every_collective)[0]
    assert found.notes == [volumes.GLOO_REDUCE_SCATTER, volumes.GLOO_REDUCE]
    flow = found.where(kind="reduce_scatter")[0]
    assert flow.textbook_bytes == 12
    assert found.sent_bytes() - found.textbook_bytes == 12 + 12
    assert "carries out reduce_scatter as an all-reduce" in repr(found)


def one_ddp_step():
    ddp = DDP(model())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        ddp(torch.ones(2, 8)).sum().backward()
        optimizer.step()

    return count(step, warmup=2)


def test_ddps_reducer_is_seen_from_cpp_in_the_backward(ranks2):
    for found in ranks2(one_ddp_step):
        assert found.payload_bytes(kind="all_reduce", phase="backward") == PARAMETERS * FLOAT
        assert found.sent_bytes() == 2 * (N - 1) / N * PARAMETERS * FLOAT
        assert found.calls(phase="forward") == 0
        assert found.where()[0].group == "world"


def accumulate(sync):
    ddp = DDP(model())

    def step():
        for last in (False, False, True):
            if last or sync:
                ddp(torch.ones(2, 8)).sum().backward()
            else:
                with ddp.no_sync():
                    ddp(torch.ones(2, 8)).sum().backward()

    return count(step, warmup=2)


def test_the_order_of_rebuilt_buckets_is_broadcast_in_the_second_step(ranks2):
    def second_step():
        ddp = DDP(model())
        step = lambda: ddp(torch.ones(2, 8)).sum().backward()  # noqa: E731
        return [count(step) for _ in range(3)]

    first, second, third = ranks2(second_step)[0]
    assert second.sent_bytes(kind="broadcast") > 0
    assert first.sent_bytes(kind="broadcast") == third.sent_bytes(kind="broadcast") == 0


def test_forgetting_no_sync_multiplies_the_bytes_by_the_microbatches(ranks2):
    once, thrice = ranks2(accumulate, False)[0], ranks2(accumulate, True)[0]
    assert thrice.sent_bytes() == 3 * once.sent_bytes() > 0


def one_fsdp_step():
    net = model()
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step():
        net(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return count(step)


def test_fsdp2_gathers_in_forward_and_backward_and_scatters_the_gradients(ranks2):
    found = ranks2(one_fsdp_step)[0]
    assert found.payload_bytes(kind="all_gather", phase="forward") == PARAMETERS * FLOAT
    assert found.payload_bytes(kind="all_gather", phase="backward") == PARAMETERS * FLOAT
    assert found.payload_bytes(kind="reduce_scatter", phase="backward") == PARAMETERS * FLOAT


def pipeline_by_hand():
    me = dist.get_rank()
    layer = nn.Linear(4, 4)
    x = torch.ones(3, 4)

    def step():
        if me == 0:
            out = layer(x)
            dist.send(out.detach(), 1)  # moves 48 bytes
            grad = torch.empty(3, 4)
            dist.recv(grad, 1)  # moves 48 bytes
            out.backward(grad)
        else:
            seen = torch.empty(3, 4, requires_grad=True)
            dist.recv(seen.data, 0)  # moves 48 bytes
            layer(seen).sum().backward()
            dist.send(seen.grad, 0)  # moves 48 bytes

    return count(step)


def test_point_to_point_takes_the_phase_of_the_work_beside_it(ranks2):
    zero, one = ranks2(pipeline_by_hand)
    assert zero.payload_bytes(kind="send", phase="forward") == 48
    assert zero.payload_bytes(kind="recv", phase="backward") == 48
    assert one.payload_bytes(kind="recv", phase="forward") == 48
    assert one.payload_bytes(kind="send", phase="backward") == 48


def batched():
    peer = 1 - dist.get_rank()

    def step():
        ops = [
            dist.P2POp(dist.isend, torch.ones(5), peer),
            dist.P2POp(dist.irecv, torch.empty(5), peer),
        ]
        for work in dist.batch_isend_irecv(ops):  # moves 20 bytes each way
            work.wait()

    return count(step)


def test_batched_point_to_point_is_counted(ranks2):
    for found in ranks2(batched):
        assert found.calls(kind="send") == found.calls(kind="recv") == 1
        assert found.sent_bytes() == 20


def functional_and_dtensor(shape):
    import torch.distributed._functional_collectives as funcol
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))["tp"]
    shard = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])

    def step():
        funcol.all_reduce(torch.ones(6), "sum", mesh).sum()  # moves 2(n-1)/n * 24 bytes
        shard.redistribute(mesh, [Replicate()]).to_local().sum()  # moves (n-1)/n * 96 bytes

    return count(step)


def test_functional_collectives_and_dtensor_are_counted(ranks2):
    found = ranks2(functional_and_dtensor, (1, 2))[0]
    assert found.payload_bytes(kind="all_reduce", group="world") == 24
    assert found.payload_bytes(kind="all_gather", group="world") == 96


def test_a_collective_carries_the_name_of_its_mesh_axis(ranks4):
    for found in ranks4(functional_and_dtensor, (2, 2)):
        assert {(f.group, f.ranks) for f in found.flows} == {("tp", 2)}
        assert found.sent_bytes() == 24 + 48


def uneven():
    me = dist.get_rank()
    sizes = [[1, 3], [2, 4]]  # rank r sends sizes[r][q] elements to rank q

    def step():
        inputs, outputs = sizes[me], [row[me] for row in sizes]
        dist.all_to_all_single(
            torch.empty(sum(outputs)), torch.ones(sum(inputs)), outputs, inputs
        )  # moves all but its own part

    return count(step)


def test_an_uneven_all_to_all_sends_what_it_really_sends(ranks2):
    zero, one = ranks2(uneven)
    assert zero.sent_bytes() == 3 * FLOAT
    assert one.sent_bytes() == 2 * FLOAT


def test_copies_between_devices_are_counted_without_ranks():
    def step():
        torch.ones(10).to("meta")
        torch.empty(7, device="meta").copy_(torch.ones(7))
        torch.ones(3).to(torch.float64)  # a cast, not a transfer

    found = count(step)
    assert found.payload_bytes(kind="copy", group="cpu->meta") == 68
    assert found.calls() == 2


def test_an_unknown_operator_is_an_error_and_not_a_zero():
    with pytest.raises(LookupError, match="unknown collective operator 'teleport'"):
        volumes.read("teleport", ())


def test_an_unknown_filter_is_refused():
    with pytest.raises(TypeError, match="no filter 'color'"):
        count(lambda: None).calls(color="red")


def by_hand(updates):
    """One process's own data parallelism: gradients summed, or parameters gathered, by hand."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step():
        for _ in range(2):
            loss = net(torch.ones(2, 8)).sum()
            loss.backward()
            loss.item()
        for p in net.parameters():
            dist.all_reduce(p.grad)  # moves 2(n-1)/n * its bytes
            p.grad /= N
        optimizer.step()
        if updates:
            for p in net.parameters():
                dist.broadcast(p.data, src=0)  # moves its bytes
        dist.all_reduce(loss.detach())  # moves 2(n-1)/n * 4 bytes

    return count(step)


def test_gradients_summed_by_hand_belong_to_the_backward(ranks2):
    for found in ranks2(by_hand, False):
        assert found.sent_bytes(phase="backward") == PARAMETERS * FLOAT
        assert found.sent_bytes(phase="forward") == FLOAT  # the loss, after the optimizer


def accumulate_fsdp():
    net = model()
    for layer in (net[0], net[2]):
        fully_shard(layer)
    fully_shard(net)

    def step():
        for _ in range(2):
            net(torch.ones(2, 8)).sum().backward()

    step()
    return count(step)


def test_what_the_second_forward_gathers_is_not_the_first_backwards(ranks2):
    found = ranks2(accumulate_fsdp)[0]
    assert found.payload_bytes(kind="all_gather", phase="forward") == 2 * PARAMETERS * FLOAT
    assert found.payload_bytes(kind="all_gather", phase="backward") == 2 * PARAMETERS * FLOAT
