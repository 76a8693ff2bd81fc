"""On a GPU only: packed attention, the head's kernels, and an optimizer in pinned host memory, against plain torch."""

import runtime  # noqa: F401

# isort: split
import threading

import pytest
import torch

import head_logprobs
import optimizer
import packing
from checkpoint import LoopState, random_states, read_checkpoint
from optimizer import MasterAdamW
from policy import Policy, load_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_packed_equals_one_by_one(make_model, family):
    """Hidden states and gradients, with fewer key/value heads than heads; both sides in bf16, judged against fp32."""
    model, _ = make_model(family, tied=False, head_dim=64)
    packing.register()
    g = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 200, (n,), generator=g).tolist() for n in (5, 300, 1, 17, 128, 129)]
    weights = torch.randn(sum(map(len, sequences)), 128, generator=g).cuda()

    def run(attention, dtype, packed):
        model.to(dtype).zero_grad()
        model.set_attn_implementation(attention)
        if packed:
            hidden = model.base_model(**packing.model_inputs(sequences, torch.device("cuda")), use_cache=False)[0][0]
        else:
            hidden = torch.cat([model.base_model(torch.tensor([s]).cuda(), use_cache=False)[0][0] for s in sequences])
        (hidden.float() * weights).sum().backward()
        grads = torch.cat([p.grad.float().flatten() for p in model.base_model.parameters()])
        return hidden.float().detach(), grads

    exact = run("sdpa", torch.float32, packed=False)
    plain = run("sdpa", torch.bfloat16, packed=False)
    ours = run(packing.ATTENTION, torch.bfloat16, packed=True)
    for reference, a, b in zip(exact, plain, ours, strict=True):
        assert (b - reference).norm() <= 1.5 * (a - reference).norm()


@pytest.mark.parametrize(("vocabulary", "temperature"), [(151936, 1.0), (1000, 0.7), (4097, 1.3)])
def test_the_heads_kernels_equal_plain_torch(vocabulary, temperature):
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 64, generator=g, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, 64, generator=g, device="cuda") * 0.3).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (300,), generator=g, device="cuda")
    upstream = torch.randn(2, 300, generator=g, device="cuda")

    def plain(h, w):
        logp = ((h @ w.t()).float() / temperature).log_softmax(-1)
        return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def chunked(h, w):
        return head_logprobs.head_logprobs(h, w, labels, temperature, chunk_elements=100 * vocabulary)

    found = []
    for function in (plain, chunked):
        out = function(hidden, weight)
        found.append(
            (
                *out,
                *torch.autograd.grad(sum((x * u).sum() for x, u in zip(out, upstream, strict=True)), (hidden, weight)),
            )
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=2e-2, atol=2e-2 * float(a.float().abs().max()))
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-3)


def test_logits_memory_does_not_grow_with_the_tokens():
    weight = torch.randn(151936, 64, device="cuda").bfloat16()

    def peak(tokens):
        hidden = torch.randn(tokens, 64, device="cuda").bfloat16().requires_grad_()
        labels = torch.zeros(tokens, dtype=torch.long, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head_logprobs.head_logprobs(hidden, weight, labels)[0].sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(16384) < peak(4096) * 1.1


@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_an_offloaded_optimizer_is_the_resident_one(monkeypatch, states):
    """bf16 moments are rounded at random, in pieces by other numbers: there the masters stay near."""
    monkeypatch.setattr(optimizer, "PIECE_ELEMENTS", 1 << 16)
    g = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(shape, generator=g, device="cuda").bfloat16() for shape in ((700, 500), (333,), (64, 64))]
    here, there = (
        MasterAdamW([w.clone() for w in weights], weight_decay=0.1, states=states, offload=offload)
        for offload in (False, True)
    )
    for _ in range(4):
        for a, b in zip(here.grads, there.grads, strict=True):
            a.normal_(generator=g)
            b.copy_(a)
        here.step(1e-2)
        there.step(1e-2)
    near = {"rtol": 0, "atol": 0} if states == "fp32" else {"rtol": 0, "atol": 2e-3}
    for a, b in zip(here.masters, there.masters, strict=True):
        assert b.is_pinned()
        torch.testing.assert_close(a.cpu(), b, **near)
    if states == "fp32":
        for a, b in zip(here._moments, there._moments, strict=True):
            assert all(torch.equal(x.cpu(), y) for x, y in zip(a, b, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(here._weights, there._weights, strict=True))


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_the_kernel_is_the_hosts_adamw(states):
    """The same updates on the GPU and on the CPU."""
    if states == "8bit":
        pytest.importorskip("torchao")
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=g).bfloat16() for shape in ((512, 300), (333,))]
    gpu, cpu = (
        MasterAdamW([w.to(d) for w in weights], weight_decay=0.1, states=s)
        for d, s in (("cuda", states), ("cpu", "fp32"))
    )
    for _ in range(6):
        for a, b in zip(gpu.grads, cpu.grads, strict=True):
            b.copy_(torch.randn(b.shape, generator=g))
            a.copy_(b)
        gpu.step(1e-3, torch.full((), 0.5, device="cuda"))
        cpu.step(1e-3, torch.full((), 0.5))
        assert not any(x.any() for x in gpu.grads)
        assert all(torch.equal(w, m.bfloat16()) for w, m in zip(gpu._weights, gpu.masters, strict=True))
    for a, b in zip(gpu.masters, cpu.masters, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b, rtol=0, atol=2e-6 if states == "fp32" else 2e-3)


class NoTokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("states", "offload"), [("fp32", False), ("bf16", False), ("8bit", False), ("fp32", True), ("bf16", True)]
)
def test_a_checkpoint_written_while_the_device_is_busy_is_the_state_of_its_moment(
    make_model, device, tmp_path, states, offload
):
    """Copied on a stream of its own while the run draws random numbers and computes, and then updates: masters, moments
    and bf16 weights of the snapshot's moment come back bit for bit, and so do the generators and the next update."""
    if states == "8bit":
        pytest.importorskip("torchao")
    _, folder = make_model("qwen2", tied=True)
    options = dict(lr=1e-2, optimizer_states=states, offload_optimizer=offload)
    size = 4096 if device.type == "cuda" else 64
    busy = torch.randn(size, size, device=device)

    def update(policy: Policy, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for grad in policy.optimizer.grads:
            grad.copy_(torch.randn(grad.shape, generator=g))
        policy.update()

    def compute() -> torch.Tensor:
        """Queued on the device, so that what follows has to wait for it."""
        found = busy
        for _ in range(50):
            found = (found @ busy).tanh()
        return found + torch.rand(size, device=device)

    def state_of(policy: Policy) -> dict[str, torch.Tensor]:
        named = dict(policy.model.named_parameters()) | policy.optimizer_state()
        return {name: tensor.detach().cpu().clone() for name, tensor in named.items()}

    def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    policy = Policy(load_model(folder, device), **options)
    for seed in range(3):
        compute()
        update(policy, seed)
    plain, tensors = random_states()
    snapshot = policy.snapshot(NoTokenizer(), LoopState(step=3, policy=policy.numbers(), random=plain), tensors)
    thread = threading.Thread(target=snapshot.write, args=(tmp_path,))
    thread.start()
    before = state_of(policy)
    compute()
    drawn = torch.rand(8, device=device)
    snapshot.wait()
    random_after = random_states()[1]
    update(policy, 3)
    thread.join()
    after = state_of(policy)

    checkpoint = read_checkpoint(tmp_path)
    other = Policy(load_model(str(tmp_path), device), **options)
    other.load_training(checkpoint)
    assert equal(state_of(other), before) and not equal(before, after)
    assert other.numbers() == checkpoint.loop.policy
    assert checkpoint.restore_random()
    compute()
    assert torch.equal(torch.rand(8, device=device), drawn)
    assert all(torch.equal(a, random_after[k]) for k, a in random_states()[1].items())
    update(other, 3)
    assert equal(state_of(other), after), "moments that are rounded at random too: the generator's state is the same"


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same(make_model, family, checkpointing):
    """Log-probs and gradients of packed batches of several sizes, judged by the error of the plain bf16 layers."""
    model, _ = make_model(family, tied=False, head_dim=64)
    packing.register()
    g = torch.Generator().manual_seed(0)

    def run(dtype, compiled):
        model.to(dtype).zero_grad()
        model.set_attn_implementation(packing.ATTENTION if dtype == torch.bfloat16 else "sdpa")
        found = []
        for sequences in batches:
            if dtype == torch.bfloat16:
                inputs = packing.model_inputs(sequences, torch.device("cuda"))
                found.append(model.base_model(**inputs, use_cache=False)[0][0].float())
            else:
                found += [model.base_model(torch.tensor([s]).cuda(), use_cache=False)[0][0] for s in sequences]
        sum((x * x.detach().roll(1, 0)).sum() for x in found).backward()
        grads = torch.cat([p.grad.float().flatten() for p in model.base_model.parameters()])
        return torch.cat(found).detach(), grads

    batches = [
        [torch.randint(0, 200, (n,), generator=g).tolist() for n in ns] for ns in ((5, 300, 17), (40,), (7, 129))
    ]
    exact = run(torch.float32, False)
    plain = run(torch.bfloat16, False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    for layer in model.base_model.layers:
        layer.compile(dynamic=True)
    ours = run(torch.bfloat16, True)
    for reference, a, b in zip(exact, plain, ours, strict=True):
        assert (b - reference).norm() <= 1.5 * (a - reference).norm()
