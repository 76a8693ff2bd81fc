"""packing.py: the bins of a budget, and a packed row against transformers' own attention on one sequence at a time.

Tolerances. fp32: 1e-5 for values of size about 1 (1e-4 for gradients, which are sums over all tokens). bf16: a packed
row may be no further from the same weights computed in fp32 than transformers' own bf16 pass is, times 1.25.
"""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import copy
import inspect
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_models import CONFIGS, V
from transformers import AttentionInterface, AutoModelForCausalLM

import packing
from packing import PackingError, model_inputs, pack, packed_attention

CPU = torch.device("cpu")
FP32 = dict(rtol=1e-5, atol=1e-5)
FP32_GRADIENT = dict(rtol=1e-4, atol=1e-4)


def make_model(
    family: str = "qwen2", dtype: torch.dtype = torch.float32, attention: str = packing.ATTENTION, **changes
) -> torch.nn.Module:
    """The same random weights for every attention, large enough that what a token attends to shows in its output."""
    packing.register()
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(std=0.1)
            else:
                p.normal_(std=0.15)
    return model.to(torch.bfloat16).to(dtype)  # bf16's values in every dtype


def random_ids(*lengths: int, seed: int = 1) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=g).tolist() for n in lengths]


PROMPT = random_ids(6, seed=2)[0]
TWO = random_ids(9, 4, seed=3)
CASES = {
    "ragged": random_ids(3, 17, 1, 8, 30, 2),
    "of length 1": random_ids(1, 1, 1, 1),
    "one": random_ids(9),
    "one token": random_ids(1),
    "equal lengths": random_ids(7, 7, 7, 7),
    "duplicates": [TWO[0], TWO[1], TWO[0], TWO[0], TWO[1]],
    "a group with one prompt": [PROMPT + response for response in random_ids(1, 9, 3, 3, 12)],
}


# ---- pack


def fewest(lengths: list[int], budget: int) -> int:
    """The fewest bins that hold `lengths`, by trying every way."""

    def place(i: int, bins: tuple[int, ...]) -> int:
        if i == len(lengths):
            return len(bins)
        into = [(*bins[:b], used + lengths[i], *bins[b + 1 :]) for b, used in enumerate(bins)]
        return min(place(i + 1, b) for b in [*into, (*bins, lengths[i])] if max(b) <= budget)

    return place(0, ())


lengths_and_budget = st.lists(st.integers(1, 40), min_size=1, max_size=60).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.integers(max(lengths), 4 * max(lengths)))
)
few_and_budget = st.lists(st.integers(1, 12), min_size=1, max_size=7).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.integers(max(lengths), 3 * max(lengths)))
)


@settings(max_examples=300, deadline=None)
@given(lengths_and_budget)
def test_pack_places_each_index_once_within_the_budget_and_evenly(case):
    lengths, budget = case
    bins = pack(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b == sorted(b) and b for b in bins)
    used = [sum(lengths[i] for i in b) for b in bins]
    assert max(used) <= budget
    assert max(used) - min(used) <= max(lengths)
    assert pack(lengths, budget) == bins == pack(tuple(lengths), budget)
    # Where one bin more is opened, each of the others is fuller than the budget less the sequence that did not fit.
    assert len(bins) <= (sum(lengths) - max(lengths)) // (budget - max(lengths) + 1) + 1


@settings(max_examples=200, deadline=None)
@given(few_and_budget)
@example(([3, 3, 2, 2, 2], 6))  # ceil(12 / 6) = 2 is feasible, but not with the two longest apart
@example(([5, 5, 5], 9))  # ceil(15 / 9) = 2 is not feasible
def test_pack_opens_as_few_bins_as_brute_force_or_one_more(case):
    """Longest first is not always the best way; for a few sequences it never costs more than one bin."""
    lengths, budget = case
    best, bins = fewest(lengths, budget), pack(lengths, budget)
    assert -(-sum(lengths) // budget) <= best <= len(bins) <= best + 1


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 80), st.integers(0, 60))
def test_pack_of_equal_lengths_is_the_fewest_bins(length, count, room):
    budget = length + room
    bins = pack([length] * count, budget)
    assert len(bins) == -(-count // (budget // length))
    sizes = [len(b) for b in bins]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("lengths", "budget", "bins"),
    [
        ([], 10, []),
        ([7], 7, [[0]]),
        ([7], 1000, [[0]]),
        ([2, 3, 4], 9, [[0, 1, 2]]),  # what fits together goes together
        ([1, 9, 1, 9], 10, [[0, 1], [2, 3]]),  # the long ones apart
        ([5, 5, 5, 5], 5, [[0], [1], [2], [3]]),
        ([8, 1, 1, 1, 1, 1, 1, 1, 1], 12, [[0], list(range(1, 9))]),  # 8 and 8, not 12 and 4
    ],
)
def test_pack_by_hand(lengths, budget, bins):
    assert sorted(pack(lengths, budget)) == bins


def test_many_sequences_of_one_token():
    bins = pack([1] * 1000, 64)
    assert len(bins) == 16 and {len(b) for b in bins} == {62, 63}


def test_many_sequences_of_a_real_step_fill_their_micro_batches():
    """512 responses of up to 1536 tokens: no micro-batch is more than 5 % under the mean, and none is wasted."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 1537, (512,), generator=g).tolist()
    bins = pack(lengths, 16384)
    used = [sum(lengths[i] for i in b) for b in bins]
    assert len(bins) <= -(-sum(lengths) // 16384) + 1
    assert min(used) > 0.95 * sum(used) / len(used)


@pytest.mark.parametrize(("lengths", "budget"), [([3, 12, 5], 11), ([2], 1), ([700, 20], 699)])
def test_a_budget_below_the_longest_sequence_is_refused_with_both_numbers(lengths, budget):
    with pytest.raises(PackingError) as error:
        pack(lengths, budget)
    words = [f"--micro-batch-tokens {budget} ", f" {max(lengths)} tokens", "--max-prompt-len", "--max-response-len"]
    assert [w for w in words if w not in str(error.value)] == []
    assert pack(lengths, max(lengths)), "the longest sequence itself is enough"


# ---- model_inputs


def test_model_inputs_by_hand():
    got = model_inputs([[5, 6, 7], [8], [9, 4]], CPU)
    assert got["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert got["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    for side in ("q", "k"):
        cumulative = got[f"cu_seq_lens_{side}"]
        assert cumulative.dtype == torch.int32 and cumulative.tolist() == [0, 3, 4, 6]
        assert type(got[f"max_length_{side}"]) is int and got[f"max_length_{side}"] == 3
    assert got["input_ids"].dtype == got["position_ids"].dtype == torch.int64
    assert got["cu_seq_lens_q"].is_contiguous()
    assert got.keys() == {
        *("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    }


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=9), min_size=1, max_size=9))
def test_model_inputs_give_the_sequences_back(sequences):
    got = model_inputs(sequences, CPU)
    ids, positions, cumulative = (got[k].flatten().tolist() for k in ("input_ids", "position_ids", "cu_seq_lens_q"))
    assert [ids[a:b] for a, b in pairwise(cumulative)] == sequences
    assert [positions[a:b] for a, b in pairwise(cumulative)] == [list(range(len(s))) for s in sequences]
    assert got["max_length_q"] == max(map(len, sequences))


def test_model_inputs_go_to_the_device():
    got = model_inputs([[1, 2], [3]], torch.device("meta"))
    assert {v.device.type for v in got.values() if isinstance(v, torch.Tensor)} == {"meta"}


# ---- a packed row against one sequence at a time


def next_token_logprobs(logits_S_V: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return logits_S_V.float().log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)


def packed(model: torch.nn.Module, sequences: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(hidden states of every layer [layers, S, H], log-probs [S - 1]) of each sequence, from one row."""
    out = model(**model_inputs(sequences, CPU), use_cache=False, output_hidden_states=True)
    lengths = [len(s) for s in sequences]
    hidden = torch.cat(out.hidden_states).split(lengths, dim=1)
    logits = out.logits[0].split(lengths)
    return [(h, next_token_logprobs(x, s)) for h, x, s in zip(hidden, logits, sequences, strict=True)]


def one_by_one(model: torch.nn.Module, sequences: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same by transformers alone, without any of packing.py."""
    result = []
    for s in sequences:
        out = model(input_ids=torch.tensor([s]), use_cache=False, output_hidden_states=True)
        result.append((torch.cat(out.hidden_states), next_token_logprobs(out.logits[0], s)))
    return result


def gradients(model: torch.nn.Module, results: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of a sum in which every hidden state of the last layer and every log-prob has a weight of its own."""
    g = torch.Generator().manual_seed(4)
    total = 0.0
    for hidden, logprobs in results:
        total = total + (hidden[-1].float() * torch.randn(hidden[-1].shape, generator=g)).mean(-1).sum()
        total = total + (logprobs * torch.randn(logprobs.shape, generator=g)).sum()
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def flat(results: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(all hidden states, all log-probs), in the order of the sequences."""
    return torch.cat([h for h, _ in results], dim=1), torch.cat([x for _, x in results])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", CONFIGS)
def test_fp32_values_and_gradients_equal_transformers_on_one_sequence_at_a_time(family, case):
    model, plain = make_model(family), make_model(family, attention="sdpa")
    got, expected = packed(model, CASES[case]), one_by_one(plain, CASES[case])
    for a, b in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(a, b, **FP32)
    for (name, a), b in zip(gradients(model, got).items(), gradients(plain, expected).values(), strict=True):
        assert b.any() or len(CASES[case][0]) == 1, f"{name}: no gradient to compare"
        torch.testing.assert_close(a, b, **FP32_GRADIENT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", ["ragged", "equal lengths", "a group with one prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_bf16_values_and_gradients_are_as_near_to_fp32_as_transformers_own(family, case):
    exact, plain = make_model(family, attention="sdpa"), make_model(family, torch.bfloat16, "sdpa")
    model = make_model(family, torch.bfloat16)
    got, theirs, expected = packed(model, CASES[case]), one_by_one(plain, CASES[case]), one_by_one(exact, CASES[case])
    for a, b, e in zip(flat(got), flat(theirs), flat(expected), strict=True):
        ours, rounding = (a.float() - e).norm(), (b.float() - e).norm()
        assert 0 < rounding < 0.05 * e.norm() and ours < 1.25 * rounding
    ours, rounding, size = 0.0, 0.0, 0.0
    passes = ((model, got), (plain, theirs), (exact, expected))
    for a, b, e in zip(*(gradients(m, r).values() for m, r in passes), strict=True):
        ours, rounding = ours + (a.float() - e).square().sum(), rounding + (b.float() - e).square().sum()
        size += e.square().sum()
    assert rounding.sqrt() < 0.05 * size.sqrt() and ours.sqrt() < 1.25 * rounding.sqrt()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_order_of_the_sequences_does_not_matter(family):
    model, sequences = make_model(family), CASES["ragged"]
    order = [4, 2, 5, 0, 3, 1]
    straight = packed(model, sequences)
    shuffled = packed(model, [sequences[i] for i in order])
    for i, (hidden, logprobs) in zip(order, shuffled, strict=True):
        torch.testing.assert_close(hidden, straight[i][0], **FP32)
        torch.testing.assert_close(logprobs, straight[i][1], **FP32)


@torch.no_grad()
@pytest.mark.parametrize("changed", [0, 2, 4])
@pytest.mark.parametrize("family", CONFIGS)
def test_changing_one_sequence_leaves_every_other_as_it_was_bit_for_bit(family, changed):
    """Lengths 5 5 9 5 5: the changed one has neighbours on both sides and others of its own length."""
    model, sequences = make_model(family), random_ids(5, 5, 9, 5, 5)
    other = list(sequences)
    other[changed] = random_ids(len(sequences[changed]), seed=7)[0]
    before, after = packed(model, sequences), packed(model, other)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a[0], b[0]) == torch.equal(a[1], b[1]) == (i != changed), i


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_a_longer_or_shorter_neighbour_changes_nothing(family):
    model, kept = make_model(family), random_ids(5, 11, 5)
    alone = packed(model, kept)
    for neighbours in (random_ids(1), random_ids(5, 40), random_ids(200, 1, 11)):
        together = packed(model, neighbours + kept + neighbours)[len(neighbours) :][: len(kept)]
        for a, b in zip(flat(together), flat(alone), strict=True):
            torch.testing.assert_close(a, b, **FP32)


@torch.no_grad()
def test_not_a_number_stays_in_its_own_sequence():
    """Weights of exactly 0 on other sequences would still spread NaN; they are not looked at."""
    model = make_model("llama")
    clean = [[1 + t % (V - 1) for t in s] for s in random_ids(5, 5, 9, 5)]
    before = packed(model, clean)
    spoiled = [*clean[:1], [*clean[1][:2], 0, *clean[1][3:]], *clean[2:]]
    model.get_input_embeddings().weight[0] = float("nan")
    after = packed(model, spoiled)
    for i in (0, 2, 3):
        assert torch.equal(after[i][0], before[i][0]) and torch.equal(after[i][1], before[i][1])
    assert after[1][0][-1, 2:].isnan().all()


@torch.no_grad()
def test_tokens_do_not_see_what_comes_after_them():
    model, sequences = make_model(), random_ids(8, 8)
    later = [[*sequences[0][:5], *random_ids(3, seed=8)[0]], sequences[1]]
    before, after = packed(model, sequences)[0][0], packed(model, later)[0][0]
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_gradient_of_one_sequence_reaches_its_own_tokens_alone(family):
    model = make_model(family)
    sequences = [list(range(5)), list(range(10, 19)), list(range(20, 25)), [30]]
    row = model.base_model(**model_inputs(sequences, CPU), use_cache=False).last_hidden_state[0]
    for sequence, hidden in zip(sequences, row.split([len(s) for s in sequences]), strict=True):
        model.zero_grad()
        hidden[-1].square().sum().backward(retain_graph=True)
        touched = model.get_input_embeddings().weight.grad.abs().sum(-1).nonzero().flatten().tolist()
        assert touched == sequence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_gradient_checkpointing_changes_no_bit(family, dtype):
    results = []
    for recompute in (False, True):
        model = make_model(family, dtype).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_gradient_checkpointing
        got = packed(model, CASES["ragged"])
        results.append([*flat(got), *gradients(model, got).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- the attention alone


def plain_attention(query, key, value, lengths, scale):
    """[T, A, D] of query [A, T, D], key and value [K, T, D]: softmax by its definition, one query at a time, fp64."""
    groups = query.shape[0] // key.shape[0]
    key, value = (x.double().repeat_interleave(groups, dim=0) for x in (key, value))
    rows, start = [], 0
    for length in lengths:
        for t in range(start, start + length):
            scores = torch.einsum("ad,asd->as", query[:, t].double(), key[:, start : t + 1]) * scale
            rows.append(torch.einsum("as,asd->ad", scores.softmax(-1), value[:, start : t + 1]))
        start += length
    return torch.stack(rows)


def random_qkv(heads: int, kv_heads: int, tokens: int, size: int = 8) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, n, tokens, size, generator=g).requires_grad_() for n in (heads, kv_heads, kv_heads)]


def lengths_of(lengths: list[int]) -> dict[str, object]:
    """The keyword arguments of packed_attention that model_inputs makes."""
    inputs = model_inputs([[0] * n for n in lengths], CPU)
    return {k: v for k, v in inputs.items() if k not in ("input_ids", "position_ids")}


def attend(query, key, value, mask=None, **options) -> torch.Tensor:
    """packed_attention as a model calls it: with arguments that it does not need, too."""
    out, weights = packed_attention(torch.nn.Module(), query, key, value, mask, position_ids=None, **options)
    assert weights is None
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.sampled_from([(1, 1), (4, 2), (4, 1), (6, 6)]),
    st.sampled_from([None, 8**-0.5, 0.7]),
)
def test_attention_and_its_gradients_are_those_of_the_definition(lengths, heads, scaling):
    inputs = random_qkv(*heads, sum(lengths))
    got = attend(*inputs, scaling=scaling, **lengths_of(lengths))
    expected = plain_attention(*(x[0] for x in inputs), lengths, 8**-0.5 if scaling is None else scaling)
    assert got.shape == (1, sum(lengths), heads[0], 8)
    torch.testing.assert_close(got[0].double(), expected, **FP32)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((expected * weights[0]).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **FP32)


# ---- what is refused


def test_more_than_one_row_is_refused():
    model = make_model()
    inputs = model_inputs([[1, 2, 3]], CPU)
    inputs |= {"input_ids": torch.ones(2, 3, dtype=torch.long), "position_ids": torch.arange(3).expand(2, 3)}
    with pytest.raises(PackingError, match="one packed row"):
        model(**inputs, use_cache=False)


@pytest.mark.parametrize("missing", [["cu_seq_lens_q"], ["max_length_q"], ["cu_seq_lens_q", "max_length_q"]])
def test_a_row_without_its_lengths_is_refused(missing):
    model = make_model()
    inputs = {k: v for k, v in model_inputs([[1, 2, 3], [4]], CPU).items() if k not in missing}
    with pytest.raises(PackingError, match="cumulative lengths"):
        model(**inputs, use_cache=False)


def test_a_mask_is_refused():
    lengths = [3, 2]
    inputs, mask = random_qkv(2, 2, 5), torch.zeros(1, 1, 5, 5)
    with pytest.raises(PackingError, match="mask"):
        attend(*inputs, mask, **lengths_of(lengths))
    with pytest.raises(PackingError, match="mask"):
        make_model()(**model_inputs([[1, 2, 3], [4, 5]], CPU), attention_mask=mask, use_cache=False)


def test_dropout_is_refused_in_training_and_has_no_effect_in_evaluation():
    model, inputs = make_model(attention_dropout=0.5), model_inputs([[1, 2, 3], [4, 5]], CPU)
    with pytest.raises(PackingError, match="dropout"):
        model.train()(**inputs, use_cache=False)
    with torch.no_grad():
        kept = model.eval()(**inputs, use_cache=False).logits
        assert torch.equal(kept, make_model().eval()(**inputs, use_cache=False).logits)


def windowed(attention: str = packing.ATTENTION) -> torch.nn.Module:
    """Full attention in the first layer, a window of 8 tokens in the second."""
    layers = ["full_attention", "sliding_attention"]
    return make_model(attention=attention, use_sliding_window=True, sliding_window=8, layer_types=layers)


@torch.no_grad()
def test_a_window_that_no_sequence_exceeds_changes_nothing():
    """The row is longer than the window; each of its sequences is not."""
    sequences = random_ids(8, 3, 8, 1)
    for a, b in zip(flat(packed(windowed(), sequences)), flat(one_by_one(windowed("sdpa"), sequences)), strict=True):
        torch.testing.assert_close(a, b, **FP32)


def test_a_window_smaller_than_a_sequence_is_refused_with_both_numbers():
    sequences = random_ids(3, 9)
    with pytest.raises(PackingError) as error:
        packed(windowed(), sequences)
    words = [" 8 tokens", " has 9", "--max-prompt-len", "--max-response-len"]
    assert [w for w in words if w not in str(error.value)] == []
    with torch.no_grad():
        full, narrow = make_model(attention="sdpa"), windowed("sdpa")
        a, b = one_by_one(full, sequences), one_by_one(narrow, sequences)
    assert torch.allclose(a[0][0], b[0][0]) and not torch.allclose(a[1][0], b[1][0]), "9 tokens feel this window"


def test_registering_twice_is_registering_once():
    packing.register()
    packing.register()
    assert AttentionInterface()[packing.ATTENTION] is packed_attention


# ---- the GPU's branch, with a varlen_attn that computes on the CPU


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


class FakeVarlen:
    """torch's varlen_attn with the names that one release or another gives its arguments; `calls` is what it got."""

    def __init__(self):
        self.calls: list[dict] = []

    def attend(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, causal, scale=None, **seen):
        assert causal, "each token would see those after it"
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        lengths = cu_seq_q.diff().tolist()
        assert max_q == max_k == max(lengths) and query.shape[0] == key.shape[0] == value.shape[0] == sum(lengths)
        self.calls.append({"scale": scale, **seen})
        q, k, v = (x.as_subclass(torch.Tensor).transpose(0, 1) for x in (query, key, value))
        return plain_attention(q, k, v, lengths, q.shape[-1] ** -0.5 if scale is None else scale).float()

    def is_causal(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=is_causal)

    def window_size(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        causal = window_size == (-1, 0)
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=causal, scale=scale)

    def enable_gqa(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert enable_gqa or query.shape[1] == key.shape[1], "as torch: fewer key heads must be announced"
        return self.attend(
            *(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k),
            causal=window_size == (-1, 0), scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip

    def no_scale(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        causal = window_size == (-1, 0)
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=causal, enable_gqa=enable_gqa)


RELEASES = {  # name: what _causal gives it beside a scale
    "is_causal": {"is_causal": True},
    "window_size": {"window_size": (-1, 0)},
    "enable_gqa": {"window_size": (-1, 0), "enable_gqa": True},
    "no_scale": {"window_size": (-1, 0), "enable_gqa": True},
}
KNOW_SCALE = ("window_size", "enable_gqa")
HEAD = 16


@pytest.fixture(params=RELEASES)
def release(request, monkeypatch):
    """(name, the fake that packing uses)."""
    fake = FakeVarlen()
    monkeypatch.setattr(packing, "_varlen_attn", lambda: getattr(fake, request.param))
    return request.param, fake


def test_the_arguments_that_each_release_of_torch_knows(release):
    name, _ = release
    assert packing._causal(None, HEAD) == RELEASES[name]
    usual = RELEASES[name] | ({"scale": HEAD**-0.5} if name in KNOW_SCALE else {})
    assert packing._causal(HEAD**-0.5, HEAD) == usual


def test_a_scale_that_torch_cannot_be_told_is_refused(release):
    name, _ = release
    if name in KNOW_SCALE:
        assert packing._causal(0.5, HEAD) == RELEASES[name] | {"scale": 0.5}
    else:
        with pytest.raises(PackingError, match=r"0\.5"):
            packing._causal(0.5, HEAD)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["as many key heads", "fewer key heads"])
@pytest.mark.parametrize("scaling", [None, HEAD**-0.5], ids=["no scale", "the usual scale"])
def test_the_gpus_branch_equals_the_cpus(release, heads, scaling):
    name, fake = release
    lengths = [3, 1, 7, 3]
    inputs = [x.detach() for x in random_qkv(*heads, sum(lengths), HEAD)]
    got = attend(*(x.as_subclass(OnGpu) for x in inputs), scaling=scaling, **lengths_of(lengths))
    torch.testing.assert_close(got.as_subclass(torch.Tensor), attend(*inputs, **lengths_of(lengths)), **FP32)
    assert fake.calls == [
        {"scale": scaling if name in KNOW_SCALE else None}
        | ({"enable_gqa": True} if "enable_gqa" in RELEASES[name] else {})
    ]


def test_a_scale_of_the_models_own_reaches_the_gpu_or_is_refused(release):
    name, fake = release
    lengths = [3, 5]
    inputs = [x.detach() for x in random_qkv(4, 2, 8, HEAD)]
    on_gpu = [x.as_subclass(OnGpu) for x in inputs]
    if name in KNOW_SCALE:
        got = attend(*on_gpu, scaling=0.6, **lengths_of(lengths)).as_subclass(torch.Tensor)
        torch.testing.assert_close(got, attend(*inputs, scaling=0.6, **lengths_of(lengths)), **FP32)
    else:
        with pytest.raises(PackingError, match=r"0\.6"):
            attend(*on_gpu, scaling=0.6, **lengths_of(lengths))
        assert fake.calls == []


def test_the_installed_torch_takes_these_arguments():
    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    cumulative = torch.tensor([0, 5], dtype=torch.int32)
    for scaling in (None, HEAD**-0.5):
        arguments = packing._causal(scaling, HEAD)
        assert arguments.get("window_size") == (-1, 0) or arguments.get("is_causal") is True
        inspect.signature(varlen).bind(*random_qkv(4, 2, 5), cumulative, cumulative, 5, 5, **arguments)


def test_a_torch_without_varlen_attn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(PackingError) as error:
        packing._varlen_attn()
    assert torch.__version__ in str(error.value) and "requirements.txt" in str(error.value)
