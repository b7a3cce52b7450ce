"""The Triton kernels against their plain twins in float64: odd sizes, poisoned memory, unequal users, every form.

They run compiled on a GPU and interpreted without one. A slab's slots stand in random order, and every slot that is
not one of the batch's holds NaN, as does everything beyond a user's tokens and every fresh output.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import pytest
import torch
import torch.utils.deterministic as deterministic

from kernels import dense, selection, slab, sparse
from kernels.dense import Form

triton = pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
from kernels import read, surprise, update  # noqa: E402  (only where there is Triton)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = 1e-5
"""Of the size of the result: sums of some hundred products in float32, up to four layers deep."""
BFLOAT16 = 3e-2
"""Of the size of the result: factors are stored with 8 bits (2^-9 each), two or three of them a layer, four layers."""
HALF = 3e-3
"""The same with the 11 bits of float16 (2^-12)."""
TOLERANCE = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: HALF}
NAN = float("nan")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is full of NaN, so an element that no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert bool(torch.empty(3, device=DEVICE).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Every element within `tolerance` of the size of the whole result; NaN is never close."""
    assert got.shape == wanted.shape
    got, wanted = got.double().cpu(), wanted.double().cpu()
    assert bool(torch.isfinite(got).all())
    error, size = (float(x.abs().max()) if x.numel() else 0.0 for x in (got - wanted, wanted))
    assert error <= tolerance * max(size, 1e-30), f"error {error:.3g} at size {size:.3g}"


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also of NaN, which equals nothing."""
    return bool(
        torch.equal(one.contiguous().cpu().view(torch.uint8), other.contiguous().cpu().view(torch.uint8))
    )


class Batch:
    """Users with unequal counts of tokens, their slots in random order among poisoned ones."""

    def __init__(self, tokens: list[int], dtype: torch.dtype):
        self.random = torch.Generator().manual_seed(sum(tokens) + 7 * len(tokens))
        self.dtype, self.users, self.chunk = dtype, len(tokens), max(tokens)
        self.slots = torch.randperm(self.users + 3, generator=self.random)[: self.users]
        self.others = [slot for slot in range(self.users + 3) if slot not in self.slots.tolist()]
        self.tokens = torch.tensor(tokens)
        self.valid = torch.arange(self.chunk) < self.tokens[:, None]

    def slab(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        out = scale * torch.randn(self.users + 3, *shape, generator=self.random)
        out[self.others] = NAN
        return out.to(dtype or self.dtype)

    def factor(self, width: int, beyond: float = NAN) -> torch.Tensor:
        out = torch.randn(self.users, self.chunk, width, generator=self.random)
        return out.masked_fill(~self.valid[..., None], beyond).to(self.dtype)

    def gate(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.random)

    def untouched(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        return same_bits(before[self.others], after[self.others])


def on_gpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def mlp(batch: Batch, width: int, hidden: int, depth: int, dtype: torch.dtype | None = None):
    """Weights that keep the size of what passes through."""
    sides = [width] + [hidden] * (depth - 1) + [width]
    return [
        batch.slab(outs, ins, dtype=dtype, scale=1.5 * ins**-0.5) for ins, outs in itertools.pairwise(sides)
    ]


PLAIN = Form()
FORMS = [
    Form(residual=True),
    Form(norm=True),
    Form(norm=True, residual=True, bias="huber", bias_parameter=0.7),
    Form(residual=True, bias="huber", bias_parameter=14.0),
    Form(bias="lp", bias_parameter=3.0),
    Form(norm=True, bias="lp", bias_parameter=1.5),
    Form(norm=True, bias="dot"),
    Form(residual=True, bias="dot"),
]
# tokens of each user, width, hidden width, depth, form
SHAPES = [
    ([1], 60, 64, 3, PLAIN),
    ([1, 0, 1], 64, 60, 2, FORMS[0]),
    ([63], 64, 60, 2, FORMS[1]),
    ([64, 0, 5], 60, 64, 4, FORMS[2]),
    ([100, 1, 37], 60, 64, 2, FORMS[3]),
    ([7, 100, 0], 64, 64, 1, FORMS[4]),
    ([64], 60, 60, 2, FORMS[5]),
    ([1, 63, 20], 64, 256, 2, FORMS[6]),
    ([2, 3], 256, 60, 3, FORMS[7]),
]
DTYPES = [torch.float32, torch.bfloat16]


def check_read(tokens, width, hidden, depth, form, dtype, weights_dtype=None):
    batch = Batch(tokens, dtype)
    layers, x = mlp(batch, width, hidden, depth, weights_dtype), batch.factor(width)
    known = x.double().nan_to_num()
    wanted = slab.dense_read([W.double() for W in layers], batch.slots, known, batch.tokens, form)
    slots, x, counts = on_gpu(batch.slots, x, batch.tokens)
    got = read.dense_read(on_gpu(*layers), slots, x, counts, form)
    assert got.dtype == dtype
    close(got, wanted, TOLERANCE[dtype])
    assert not bool(got.cpu()[~batch.valid].any()), "beyond a user's tokens there are zeros"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "hidden", "depth", "form"), SHAPES)
def test_dense_read_is_its_twin(tokens, width, hidden, depth, form, dtype):
    check_read(tokens, width, hidden, depth, form, dtype)


def test_dense_read_of_long_chunks_wide_layers_and_mixed_dtypes():
    check_read([2000, 300], 60, 60, 1, FORMS[2], torch.bfloat16)
    check_read([1, 1], 512, 256, 2, FORMS[2], torch.bfloat16)
    check_read([130, 40], 512, 256, 1, FORMS[0], torch.float16)
    check_read([5, 9], 60, 64, 2, PLAIN, torch.bfloat16, weights_dtype=torch.float32)
    check_read([5, 9], 60, 64, 2, PLAIN, torch.float32, weights_dtype=torch.bfloat16)
    check_read([1, 1], 60, 64, 2, PLAIN, torch.float32, weights_dtype=torch.float16)


def check_surprise(tokens, width, hidden, depth, form, dtype):
    batch = Batch(tokens, dtype)
    layers, key, value = mlp(batch, width, hidden, depth), batch.factor(width), batch.factor(width)
    known = (key.double().nan_to_num(), value.double().nan_to_num())
    wanted = slab.dense_surprise([W.double() for W in layers], batch.slots, *known, batch.tokens, form)
    slots, key, value, counts = on_gpu(batch.slots, key, value, batch.tokens)
    got = surprise.dense_surprise(on_gpu(*layers), slots, key, value, counts, form)
    for name in ("deltas", "inputs"):
        for one, other in zip(getattr(got, name), getattr(wanted, name), strict=True):
            assert one.dtype == dtype
            close(one, other, TOLERANCE[dtype])
            assert not bool(one.cpu()[~batch.valid].any()), "beyond a user's tokens there are zeros"
    close(got.norm_LUC, wanted.norm_LUC, TOLERANCE[dtype])
    assert not bool(got.norm_LUC.cpu()[:, ~batch.valid].any())
    return got, lambda: surprise.dense_surprise(on_gpu(*layers), slots, key, value, counts, form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "hidden", "depth", "form"), SHAPES)
def test_dense_surprise_is_its_twin(tokens, width, hidden, depth, form, dtype):
    check_surprise(tokens, width, hidden, depth, form, dtype)


def test_dense_surprise_of_long_chunks_and_wide_layers():
    got, again = check_surprise([2000], 16, 16, 1, FORMS[0], torch.bfloat16)
    assert torch.equal(got.norm_LUC, again().norm_LUC), "no sum is a race"
    check_surprise([9, 2], 512, 256, 1, PLAIN, torch.float16)


def test_a_value_that_is_said_exactly_has_no_gradient():
    batch = Batch([3], torch.float32)
    layers, key = [torch.zeros(4, 60, 60)], batch.factor(60)
    for bias, parameter in (("l2", 0.0), ("lp", 3.0), ("lp", 1.5), ("huber", 0.5)):
        form = Form(residual=True, bias=bias, bias_parameter=parameter)
        slots, k, counts = on_gpu(batch.slots, key, batch.tokens)
        found = surprise.dense_surprise(on_gpu(*layers), slots, k, k, counts, form)
        assert not bool(found.deltas[0].any() or found.norm_LUC.any()), bias


def step_coefficients(batch: Batch, shared: bool) -> dense.Coefficients:
    users, chunk = batch.users, batch.chunk
    if shared:
        return dense.pooled_coefficients(
            batch.gate(users), 0.1 * batch.gate(users, chunk), batch.gate(users), batch.valid
        )
    gates = [batch.gate(users, chunk), 0.1 * batch.gate(users, chunk), 0.05 * batch.gate(users, chunk)]
    return dense.coefficients(gates[0], gates[1], gates[2], batch.valid)


def moved(c: dense.Coefficients, change) -> dense.Coefficients:
    """Every coefficient through `change`; what was one tensor stays one."""
    out = {field.name: change(getattr(c, field.name)) for field in dataclasses.fields(c)}
    if c.write_UC is c.push_UC:
        out["write_UC"] = out["push_UC"]
    return dense.Coefficients(**out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "outs", "ins", "shared", "weight_decay"),
    [
        ([1], 60, 64, False, 0.0),
        ([63, 0, 5], 64, 60, True, 0.0),
        ([64, 1], 256, 60, False, 1e-2),
        ([100, 33, 0], 60, 256, True, 1e-2),
        ([1100], 64, 64, False, 1e-3),
    ],
)
def test_dense_step_is_its_twin(tokens, outs, ins, shared, weight_decay, dtype):
    batch = Batch(tokens, dtype)
    W, S = batch.slab(outs, ins), batch.slab(outs, ins, dtype=torch.float32)
    delta, inputs, c = batch.factor(outs, 0.0), batch.factor(ins, 0.0), step_coefficients(batch, shared)
    wanted_W, wanted_S = W.double(), S.double()
    exact = moved(c, torch.Tensor.double)
    start = wanted_W[batch.slots]
    wanted_W[batch.slots], wanted_S[batch.slots] = dense.step(
        start, wanted_S[batch.slots], delta.double(), inputs.double(), exact,
        weight_decay * start if weight_decay else None,
    )  # fmt: skip
    got_W, got_S, slots, delta, inputs = on_gpu(W.clone(), S.clone(), batch.slots, delta, inputs)
    update.dense_step_(got_W, got_S, slots, delta, inputs, moved(c, lambda x: x.to(DEVICE)), weight_decay)
    close(got_W[slots], wanted_W[batch.slots], TOLERANCE[dtype])
    close(got_S[slots], wanted_S[batch.slots], TOLERANCE[dtype])
    assert batch.untouched(W, got_W)
    assert batch.untouched(S, got_S)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "outs", "ins", "rows", "columns"),
    [
        ([1], 60, 64, 1, 64),
        ([63, 0, 5], 64, 60, 7, 9),
        ([64], 256, 100, 70, 20),
        ([100, 33, 0], 60, 256, 8, 70),
    ],
)
def test_masked_step_is_its_twin(tokens, outs, ins, rows, columns, dtype):
    batch = Batch(tokens, dtype)
    W, delta, inputs = batch.slab(outs, ins), batch.factor(outs, 0.0), batch.factor(ins, 0.0)
    weight = batch.gate(batch.users, batch.chunk) * batch.valid
    keep, decay = batch.gate(batch.users), 0.1 * batch.gate(batch.users)
    chosen = [
        torch.stack([torch.randperm(n, generator=batch.random)[:m].sort().values for _ in tokens])
        for n, m in ((outs, rows), (ins, columns))
    ]
    start = W.double()[batch.slots]
    block = selection.masked_step(
        start, delta.double(), inputs.double(), weight.double(), keep.double(), decay.double(), *chosen
    )
    got, slots, *rest = on_gpu(W.clone(), batch.slots, delta, inputs, weight, keep, decay, *chosen)
    update.masked_step_(got, slots, *rest)
    close(got[slots], selection.scatter_block(start, chosen[0], chosen[1], block), TOLERANCE[dtype])
    kept = torch.ones_like(W[batch.slots], dtype=torch.bool)
    kept = selection.scatter_block(kept, chosen[0], chosen[1], torch.zeros_like(block))
    assert same_bits(W[batch.slots][kept], got.cpu()[batch.slots][kept]), "only selected places change"
    assert batch.untouched(W, got)


def codes(batch: Batch, rows: int, width: int, active: int, dim: int):
    """Columns, values, targets and gates of written tokens; the last token repeats the first one's code."""
    columns, values = sparse.sparse_code(torch.randn(rows, width, generator=batch.random), active)
    columns[-1:], values[-1:] = columns[:1], values[:1]
    return columns, values, torch.randn(rows, dim, generator=batch.random), batch.gate(rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "users", "width", "active", "dim"),
    [(1, 1, 60, 1, 60), (63, 3, 64, 7, 16), (64, 64, 256, 24, 130), (100, 3, 60, 33, 64)],
)
def test_sparse_read_is_its_twin(rows, users, width, active, dim, dtype):
    batch = Batch([1] * users, dtype)
    memory = batch.slab(width, dim)
    columns, values, *_ = codes(batch, rows, width, active, dim)
    slots = batch.slots[torch.randint(0, users, (rows,), generator=batch.random)]
    wanted = (memory.double()[slots[:, None], columns] * values.double()[..., None]).sum(1)
    got = read.sparse_read(*on_gpu(memory, slots, columns, values))
    assert got.dtype == torch.float32
    close(got, wanted, FLOAT32)


TOKENS = [[1], [1, 1, 1], [1, 0, 1, 0], [1] * 64, [63], [3, 0, 64], [2] + [1] * 20 + [5]]


@pytest.mark.parametrize(
    ("tokens", "width", "active", "dim", "dtype"),
    [
        (tokens, *shape)
        for tokens, shape in zip(
            TOKENS,
            [
                (60, 1, 60, torch.float32),
                (64, 24, 130, torch.float16),
                (256, 5, 16, torch.bfloat16),
                (256, 4, 64, torch.float16),
                (60, 5, 60, torch.float32),
                (64, 5, 64, torch.bfloat16),
                (256, 7, 16, torch.float16),
            ],
            strict=True,
        )
    ],
)
def test_sparse_step_is_its_twin(tokens, width, active, dim, dtype):
    batch = Batch(tokens, dtype)
    memory, alpha = batch.slab(width, dim), batch.gate(batch.users)
    columns, values, target, weight = codes(batch, sum(tokens), width, active, dim)
    arguments = (memory, batch.slots, batch.tokens, columns, values, target, weight, alpha)
    wanted_rows, wanted = sparse.sparse_step(*arguments)
    on_device = on_gpu(*arguments)
    rows, new = update.sparse_step(*on_device)
    assert torch.equal(rows.cpu(), wanted_rows)
    close(new, wanted, FLOAT32)
    assert same_bits(memory, on_device[0]), "nothing is written to the slab"


@pytest.mark.parametrize("tokens", [[1, 3, 0, 2, 1], [1, 1, 1, 1]])
def test_sparse_step_gives_a_user_the_same_bits_in_any_company(tokens):
    batch = Batch(tokens, torch.float16)
    memory, alpha = batch.slab(64, 40), batch.gate(batch.users)
    rest = codes(batch, sum(tokens), 64, 6, 40)
    parts = [x.split(tokens) for x in rest]

    def of(users: list[int]) -> dict[int, torch.Tensor]:
        chosen = [torch.cat([part[user] for user in users]) for part in parts]
        rows, new = update.sparse_step(
            *on_gpu(memory, batch.slots[users], batch.tokens[users], *chosen, alpha[users])
        )
        return dict(zip(rows.tolist(), new.cpu(), strict=True))

    whole = of(list(range(len(tokens))))
    turned = of(list(reversed(range(len(tokens)))))
    assert whole.keys() == turned.keys()
    assert all(torch.equal(whole[row], turned[row]) for row in whole)
    for user in range(len(tokens)):  # alone, a user with one token is served by the other kernel
        assert all(torch.equal(whole[row], new) for row, new in of([user]).items())


def test_no_user_and_no_token_are_no_launch():
    batch = Batch([2], torch.float32)
    (W,) = on_gpu(batch.slab(64, 64))
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    empty = torch.zeros(0, 2, 64, device=DEVICE)
    assert read.dense_read([W, W], none, empty, none, PLAIN).shape == (0, 2, 64)
    assert surprise.dense_surprise([W, W], none, empty, empty, none, PLAIN).norm_LUC.shape == (2, 0, 2)
    codes_ = torch.zeros(0, 3, dtype=torch.int64, device=DEVICE)
    assert read.sparse_read(W, none, codes_, codes_.float()).shape == (0, 64)
    flat, zero = torch.zeros(0, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    wide = torch.zeros(0, 64, device=DEVICE)
    rows, new = update.sparse_step(W, none, none, codes_, codes_.float(), wide, flat, flat)
    assert (rows.shape, new.shape) == ((0,), (0, 64))
    slots = torch.arange(2, device=DEVICE)
    rows, new = update.sparse_step(
        W, slots, zero, codes_, codes_.float(), wide, flat, torch.zeros(2, device=DEVICE)
    )
    assert (rows.shape, new.shape) == ((0,), (0, 64))


@pytest.mark.parametrize(
    ("kernel", "twin"),
    [
        (read.sparse_read, sparse.sparse_read),
        (read.dense_read, slab.dense_read),
        (surprise.dense_surprise, slab.dense_surprise),
        (update.sparse_step, sparse.sparse_step),
        (update.dense_step_, slab.dense_step_),
        (update.masked_step_, slab.masked_step_),
    ],
)
def test_twins_have_one_signature(kernel, twin):
    assert inspect.signature(kernel) == inspect.signature(twin)
    assert kernel.__name__ == twin.__name__
