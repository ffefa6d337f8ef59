"""Every codec by itself: shapes, dtypes, the declared error, what is not finite, bytes and bad options."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from graphrewrite.passes.compression._packing import pack, packed_size, round_down, round_up, unpack
from graphrewrite.passes.compression.hadamard import rotate
from graphrewrite.passes.compression.int8 import Int8
from graphrewrite.passes.compression.mask import WindowIndex
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import graphrewrite as gr
from graphrewrite import random, registry, textform

LOSSY = (
    *("int8", "int4", "int2", "int8{symmetric=true}", "int4{symmetric=true,group=16}", "int2{group=7}"),
    *("int8{rounding=stochastic}", "int4{rounding=stochastic,symmetric=true}", "int2{rounding=stochastic}"),
    *("fp8", "fp8{format=e5m2,group=5}", "fp16", "bf16", "topk", "topk{fraction=0.5,group=8}"),
    *("hadamard", "hadamard{bits=8,group=16}", "hadamard{bits=2,rounding=stochastic}"),
    *("lloyd", "lloyd{bits=3,group=16}", "lloyd{bits=2,group=7}"),
    *("lowrank{rank=2}", "velora{groups=2}", "velora{groups=1,rank=2}"),
)
BY_ROWS = ("lowrank", "velora")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True)


def draws(seed=0):
    """Uniform numbers of the counter-based generator: a new stream for each call."""
    streams = iter(range(1, 1000))
    return lambda size: random.uniform(torch.tensor([seed, 0, 0]), next(streams), size)


def encode(codec, x, seed=0):
    held = codec.encode(x, draw=draws(seed)) if codec.random else codec.encode(x)
    return [held] if isinstance(held, torch.Tensor) else list(held)


def round_trip(codec, x, seed=0):
    decoded = codec.decode(encode(codec, x, seed), x)
    assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype)
    return decoded


def within_bound(codec, x, seed=0):
    error = round_trip(codec, x, seed).double() - x.double()
    bound = codec.bound(x).double()
    if bound.ndim == 0 and x.ndim:
        assert error.norm() <= bound
    else:
        assert bool((error.abs() <= bound).all()), (error.abs() - bound).max()


def tensors(name):
    """Shapes the codec takes: rows of a few features where it projects rows."""
    sizes = st.lists(st.integers(0, 7), min_size=0, max_size=3)
    if name.split("{")[0] in BY_ROWS:
        return st.lists(st.integers(0, 5), min_size=1, max_size=2).map(lambda s: [*s, 8])
    return sizes


# --- the error that is declared --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 20, 64, 256, 300])
def test_topk_keeps_elements_that_are_there(count):
    """The last group is filled up: what fills it up must not take the places of equal elements, or larger ones."""
    codec, tensor = textform.build("codec", "topk"), torch.ones(count)
    tensor[-1] = 5.0
    found = codec.decode(codec.encode(tensor), tensor)
    kept = [min(codec.kept, size) for size in (*[256] * (count // 256), count % 256)]
    assert int((found != 0).sum()) == sum(kept)
    assert found[-1] == 5.0


def test_topk_leaves_dropout_masks_alone():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 4))
    x, y = torch.randn(6, 8), torch.randint(0, 4, (6,))
    rows = gr.compile(model, compress="topk", example_inputs=x, example_targets=y).report().saved
    kinds = {row.operator: row.codec for row in rows if row.kind == "activation" and row.module == "1"}
    assert kinds["div"] == ""
    assert kinds["mul"] == "topk"


def test_scales_are_rounded_outwards_to_the_next_bfloat16():
    x = torch.cat([torch.randn(4096) * 10.0 ** torch.randint(-38, 38, (4096,)), torch.randn(64).bfloat16().float()])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan])])
    up, down = round_up(x, torch.bfloat16), round_down(x, torch.bfloat16)
    real = ~x.isnan()
    assert (up.float() >= x)[real].all()
    assert (down.float() <= x)[real].all()
    assert up.isnan().equal(x.isnan())
    fits = x.bfloat16().float() == x
    assert (up.float() == x)[fits].all()
    # neighbours, where it does not fit
    between = real & ~fits & up.isfinite() & down.isfinite()
    assert (up.view(torch.int16).int() - down.view(torch.int16).int())[between & (x > 0)].eq(1).all()
    # the payload of a NaN must not carry into the sign
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert round_up(odd, torch.bfloat16).isnan().all()


@pytest.mark.parametrize("name", ["int8", "int4{symmetric=true,group=16}", "fp8", "hadamard"])
def test_the_bound_holds_in_fused_code(name):
    """Inductor drops casts to bfloat16 and back: a minimum above its group clipped everything."""
    codec = textform.build("codec", name)
    torch.manual_seed(0)
    x = 100.3 + 0.1 * torch.rand(16, 40)
    torch.compiler.reset()
    stored = torch.compile(lambda x: encode(codec, x), dynamic=False)(x)
    torch.testing.assert_close(codec.decode(stored, x), codec.decode(encode(codec, x), x), rtol=1e-5, atol=1e-5)
    bound = codec.bound(x)
    if bound is not None:
        assert ((codec.decode(stored, x).double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("name", LOSSY)
def test_error_is_within_the_declared_bound(name):
    codec = textform.build("codec", name)

    @EXAMPLES
    @given(
        tensors(name),
        st.sampled_from(DTYPES),
        st.sampled_from(("normal", "constant", "tiny", "huge", "offset", "sparse")),
        st.integers(0, 2**16),
    )
    def check(shape, dtype, kind, seed):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        scale = 1e4 if dtype == torch.float16 else 1e30
        x = {
            "normal": x,
            "constant": torch.full_like(x, 3.14159),
            "tiny": x * 1e-6,
            "huge": x.clamp(-3, 3) * scale,
            "offset": x + 1000,
            "sparse": x * (x > 1),
        }[kind]
        x = x.to(dtype)
        if dtype in codec.dtypes:
            within_bound(codec, x, seed)

    check()


@pytest.mark.parametrize("name", LOSSY)
def test_layouts_and_empty_tensors(name):
    """Codecs read the elements in logical order, whatever the strides."""
    codec = textform.build("codec", name)
    base = torch.randn(8, 6, 8)
    for x in (base.transpose(0, 2), base[:, ::2], base[0, 0].expand(3, 8), torch.zeros(0, 8), torch.zeros(3, 0, 8)):
        within_bound(codec, x)
        assert torch.equal(round_trip(codec, x), round_trip(codec, x.contiguous()))


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_visible(name, bad):
    """An overflow must reach the gradients: a `GradScaler` skips the step for it."""
    codec = textform.build("codec", name)
    x = torch.randn(40, 8)
    x[3, 3] = bad
    assert not round_trip(codec, x)[3, 3].isfinite()


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "fp8", "int4{symmetric=true}"])
def test_other_groups_are_not_spoilt(name):
    codec = dataclasses.replace(textform.build("codec", name), group=16)
    x = torch.randn(8, 16)
    x[2, 5] = math.nan
    y = round_trip(codec, x)
    assert y[2].isnan().all()
    rest = [0, 1, *range(3, 8)]
    within_bound(codec, x[rest])
    assert torch.equal(y[rest], round_trip(codec, x[rest]))


def test_zeros_stay_zero():
    """The zeros behind a ReLU are exact: the minimum of a group is stored exactly where bfloat16 can."""
    x = torch.randn(64, 16).relu()
    for name in ("int8", "int4", "int2", "int4{symmetric=true}", "fp8", "fp16", "topk", "lloyd"):
        assert (round_trip(textform.build("codec", name), x)[x == 0] == 0).all(), name


def test_quantisation_is_that_of_the_formula():
    """One group, against the arithmetic written out."""
    x = torch.randn(32, dtype=torch.float64)
    low, high = x.min(), x.max()
    for bits in (8, 4, 2):
        codec = textform.build("codec", f"int{bits}{{group=32}}")
        step = (high - low) / (2**bits - 1)
        expected = low + ((x - low) / step).round() * step
        # scale and minimum are stored in float32
        torch.testing.assert_close(round_trip(codec, x), expected, rtol=0, atol=float(step) * 0.01)


# --- stochastic rounding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "hadamard{bits=2}", "int2{symmetric=true}"])
def test_stochastic_rounding_is_unbiased(name):
    """z-test of every element over 256 seeds."""
    codec = dataclasses.replace(textform.build("codec", name), rounding="stochastic", group=16)
    x = torch.randn(48, dtype=torch.float64)
    seeds = 256
    samples = torch.stack([round_trip(codec, x, seed) for seed in range(seeds)])
    error = samples.mean(0) - x
    deviation = samples.std(0) / math.sqrt(seeds)
    assert (deviation > 0).sum() > 40  # it does draw
    # rare draws are not normal: an element next to a level is judged by the deviation of the others
    z = (error / deviation.clamp_min(0.3 * float(deviation.max()))).abs()
    assert (z < 3).double().mean() >= 0.95
    assert z.max() < 5


def test_stochastic_rounding_follows_the_seed():
    codec = Int8(rounding="stochastic")
    x = torch.randn(64)
    assert torch.equal(round_trip(codec, x, 1), round_trip(codec, x, 1))
    assert not torch.equal(round_trip(codec, x, 1), round_trip(codec, x, 2))


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in LOSSY if n.split("{")[0] not in BY_ROWS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_declared_bits_are_the_bytes_that_are_stored(name, dtype):
    codec = textform.build("codec", name)
    if dtype not in codec.dtypes:
        return
    x = torch.randn(7 * 128, 256).to(dtype)
    stored = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in encode(codec, x)}
    assert abs(sum(stored.values()) * 8 / x.numel() - codec.bits_per_element(dtype)) < 0.01


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 3, 8, 29])
def test_packing_is_reversible(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(count, bits) <= math.ceil(count / 8) * bits + 2
    assert torch.equal(unpack(packed, bits, count)[:count], codes)


def test_packing_of_a_known_case():
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 4).tolist() == [1 + 3 * 16, 2]
    assert pack(torch.tensor([True, False, True, *[False] * 5]), 1).tolist() == [0b101]


# --- parts -----------------------------------------------------------------------------------------------------------


def test_rotation_is_the_hadamard_matrix():
    matrix = torch.tensor([[1.0]])
    for _ in range(3):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(5, 8)
    torch.testing.assert_close(rotate(x), x @ matrix / math.sqrt(8))
    torch.testing.assert_close(rotate(rotate(x)), x)


def test_rotation_helps_against_outliers():
    x = torch.randn(4, 128)
    x[:, 7] = 80
    plain, rotated = (textform.build("codec", f"{name}{{group=128}}") for name in ("int4", "hadamard"))
    errors = [(round_trip(codec, x) - x).norm() for codec in (plain, rotated)]
    assert errors[1] < 0.7 * errors[0]


def test_low_rank_keeps_what_has_low_rank():
    x = torch.randn(40, 2, dtype=torch.float64) @ torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(round_trip(textform.build("codec", "lowrank{rank=2}"), x), x)
    assert (round_trip(textform.build("codec", "lowrank{rank=1}"), x) - x).norm() > 0.1 * x.norm()


def test_velora_is_the_projection_on_the_mean():
    x = torch.randn(10, 12, dtype=torch.float64) + 1
    parts = x.view(-1, 4)
    v = parts.mean(0) / parts.mean(0).norm()
    expected = ((parts @ v)[:, None] * v).view(10, 12)
    torch.testing.assert_close(round_trip(textform.build("codec", "velora{groups=3}"), x), expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((2, 2), (2, 2), (0, 0), (1, 1)), ((3, 2), (1, 2), (1, 1), (1, 1)), ((3, 3), (2, 1), (1, 0), (2, 1))],
)
def test_window_indices_are_exact(kernel, stride, padding, dilation):
    x = torch.randn(2, 3, 9, 8)
    _, index = torch.nn.functional.max_pool2d(x, kernel, stride, padding, dilation, return_indices=True)
    codec = WindowIndex(kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    held = codec.encode(index, 8)
    assert torch.equal(codec.decode(held, index, 8), index)
    assert held[0].numel() <= math.ceil(index.numel() * codec.bits_per_element(torch.int64) / 8) + 2


# --- declarations ----------------------------------------------------------------------------------------------------


def test_every_codec_declares_itself():
    for name in registry.known("codec"):
        codec = registry.find("codec", name)
        if not (isinstance(codec, type) and issubclass(codec, gr.SavedCodec)):
            continue
        made = codec()
        assert isinstance(made, gr.Codec)
        assert made.name == name
        assert made.summary
        assert made.error
        assert made.dtypes
        assert 0 <= made.bits_per_element(torch.float32) <= 32
        assert textform.build("codec", str(textform.to_text(made))) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4{group=0}", "group=0"),
        ("int4{rounding=up}", "rounding='up'"),
        ("int3", "no codec is named 'int3'"),
        ("int4{bits=4}", "no option 'bits'"),
        ("hadamard{bits=3}", "bits=3"),
        ("lloyd{bits=8}", "bits=8"),
        ("lloyd{group=0}", "group=0"),
        ("hadamard{group=48}", "no power of two"),
        ("fp8{format=e3m4}", "format='e3m4'"),
        ("topk{fraction=0}", "fraction=0"),
        ("topk{group=512}", "1 to 256"),
        ("lowrank{rank=0}", "rank=0"),
        ("velora{groups=0}", "groups=0"),
        ("recompute{plan=some}", "plan='some'"),
    ],
)
def test_bad_options_are_refused(text, message):
    with pytest.raises(gr.RuleError, match=message):
        textform.build("codec", text)


def test_stochastic_rounding_without_draws_is_refused():
    with pytest.raises(gr.RuleError, match="numbers to draw"):
        Int8(rounding="stochastic").encode(torch.randn(4))


def test_lloyd_errs_less_than_integers_at_equal_bits():
    """On what activations look like: normal, behind GELU, and gated by SiLU, where integers lose most."""
    a, b = torch.randn(2, 2**15, generator=torch.Generator().manual_seed(0))
    fitted, integers = textform.build("codec", "lloyd"), textform.build("codec", "int4")
    assert fitted.bits_per_element(torch.float32) == integers.bits_per_element(torch.float32) == 4.25
    for x, gain in ((a, 0.85), (functional.gelu(0.6 * a), 0.9), (functional.silu(0.6 * a) * b, 0.65)):
        apart = [float((round_trip(codec, x) - x).norm() / x.norm()) for codec in (fitted, integers)]
        assert apart[0] < gain * apart[1], apart
