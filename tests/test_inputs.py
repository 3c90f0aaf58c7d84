"""The line of text that says what arguments look like, and the sizes that are tried."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tritorch.registry import Maker
from tritorch.testing import input_guess, input_sizes, inputs

pytestmark = pytest.mark.reference

LINEAR = "x[M, K] weight[N, K%16] bias[N]"


def arguments(text, **sizes):
    return inputs.parse(text).sample(sizes, Maker(torch.float16)).arguments


def test_tensors_have_their_letters_sizes_and_their_dtypes():
    made = arguments("x[M, 4]  index[M]:int32<K,mask[K]:bool\nstats[2]:float32", M=3, K=5)
    assert [(n, tuple(t.shape), t.dtype) for n, t in made.items()] == [
        ("x", (3, 4), torch.float16),
        ("index", (3,), torch.int32),
        ("mask", (5,), torch.bool),
        ("stats", (2,), torch.float32),
    ]
    many = arguments("index[M]:int64<K w[K]", M=200, K=5)["index"]
    assert many.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-5", 1e-5),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("None", None),
        ("mean", "mean"),
        ("'a b'", "a b"),
        ("(1, 2)", (1, 2)),
        ("torch.int32", torch.int32),
        ("N", 6),
        ("(N, 2)", (6, 2)),
        ("[N]", [6]),
        ("P", "P"),
    ],
)
def test_values_are_literals_and_may_name_sizes(word, value):
    made = arguments(f"x[N] option={word}", N=6)
    assert made["option"] == value
    assert type(made["option"]) is type(value)


def test_arguments_keep_the_order_of_the_text():
    made = arguments("n=N x[N] flag=true y[N]", N=2)
    assert list(made) == ["n", "x", "flag", "y"]


def test_a_letter_can_be_fixed_and_constrained():
    text = inputs.parse(LINEAR + " N=64")
    assert text.letters == ("M", "K")
    made = text.sample({"M": 2, "K": 32}, Maker()).arguments
    assert made["weight"].shape == (64, 32)
    assert "N" not in made
    assert [text.allowed("K", size) for size in (0, 1, 17, 31)] == [0, 16, 16, 32]
    assert inputs.parse(text.pinned({"M": 2, "K": 32})).letters == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no tensor"),
        ("eps=1", "no tensor"),
        ("x[M] ?", "received '\\?'"),
        ("x[M+1]", "x has the size 'M\\+1'"),
        ("x[M]:int65", "unknown dtype 'int65'"),
        ("x[M]:int64<K", "x is bounded by K, no size"),
        ("x[M] M=-1", "size M must be a number, received -1"),
        ("x[M] x[M]", "x occurs twice"),
    ],
)
def test_what_cannot_be_read_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        inputs.parse(text)


def test_names_are_compared_with_the_functions_own():
    def function(x, weight, *, eps=1e-5):
        pass

    inputs.parse("x[N] weight[N] eps=0.1", function)
    with pytest.raises(ValueError, match="no argument weight: function takes x, weight, eps"):
        inputs.parse("x[N]", function)
    with pytest.raises(ValueError, match="unknown bias"):
        inputs.parse("x[N] weight[N] bias[N]", function)
    # functions of torch that are written in C++ have no signature
    inputs.parse("x[N]", torch.relu)


def test_the_same_seed_makes_the_same_tensors():
    text = inputs.parse(LINEAR)
    (first,), (second,) = (
        list(text.samples([{"M": 2, "K": 16, "N": 3}])(Maker(seed=seed))) for seed in (7, 7)
    )
    assert first.name == "M=2 K=16 N=3"
    assert all(torch.equal(first.arguments[n], second.arguments[n]) for n in first.arguments)
    meta = text.sample({"M": 2, "K": 16, "N": 3}, Maker(device="meta")).arguments
    assert {n: t.shape for n, t in meta.items()} == {n: t.shape for n, t in first.arguments.items()}


def launched(**constants):
    return SimpleNamespace(constants=constants)


def test_tiles_are_the_constants_that_look_like_one():
    assert input_sizes.tile_sizes([launched(BLOCK_M=64, BLOCK_K=16, GROUP_M=8, HAS_BIAS=True)]) == (
        16,
        64,
    )
    assert input_sizes.tile_sizes([launched(N=128, num_warps=4), launched(N=32)]) == (32, 128)
    assert input_sizes.tile_sizes([launched(BLOCK=1)]) == ()


def test_sizes_lie_around_the_edges_of_tiles():
    assert input_sizes.sizes_around((16, 32, 64), "quick") == (1, 16, 17, 64, 65)
    assert input_sizes.sizes_around((16,), "full") == (1, 15, 16, 17, 31, 33)


@pytest.mark.parametrize("level", ["quick", "full"])
def test_every_size_crosses_the_edge_of_a_tile(level):
    text = inputs.parse("x[M, K] weight[N, K]")
    chosen = input_sizes.choices(text, (16, 32), level, 0)
    for letter in text.letters:
        sizes = {choice[letter] for choice in chosen}
        assert {1, 17, 33} <= sizes
        # alone: the other sizes are within one tile
        assert any(
            choice[letter] == 33 and all(choice[o] < 16 for o in text.letters if o != letter)
            for choice in chosen
        )
    assert all(size > 16 for size in chosen[1].values())
    assert len(chosen) == len({tuple(choice.values()) for choice in chosen})
    assert len(chosen) <= {"quick": 12, "full": 60}[level]
    assert chosen == input_sizes.choices(text, (16, 32), level, 0)


def test_constraints_and_memory_bound_what_is_chosen():
    text = inputs.parse("x[M%8, K%16]")
    chosen = input_sizes.choices(text, (16,), "full", 0)
    assert all(c["M"] % 8 == 0 and c["K"] % 16 == 0 and c["M"] and c["K"] for c in chosen)
    large = input_sizes.choices(inputs.parse("x[A, B, C]"), (128,), "quick", 0)
    assert all(c["A"] * c["B"] * c["C"] <= 1 << 14 for c in large)


def test_empty_tensors_are_tried_one_size_at_a_time_but_for_bounds():
    text = inputs.parse("weight[V, D] index[M]:int64<V")
    assert [[n for n, size in c.items() if size == 0] for c in input_sizes.empties(text)] == [
        ["D"],
        ["M"],
    ]


def test_sizes_in_a_third_tile_come_with_those_that_tell_what_they_take():
    small = {"M": 5, "N": 8}
    assert list(input_sizes.third_tiles(inputs.parse("x[M, N%8]"), (16, 32))) == [
        (small, small | {"M": 33}, small | {"M": 65}),
        (small, small | {"N": 32}, small | {"N": 72}),
    ]
    assert list(input_sizes.third_tiles(inputs.parse("x[M, N]"), (1 << 13,))) == []


def test_a_configuration_gets_whole_numbers_of_its_own_tiles_and_of_the_others():
    of = input_sizes.of_configuration
    assert of(inputs.parse("x[M, N]"), (32, 64), (16, 64)) == [
        {"M": 5 + 32, "N": 3 + 32},
        {"M": 64, "N": 64},
        {"M": 16, "N": 16},
    ]
    # in the last directions, where all of them are too many
    assert of(inputs.parse("x[A, M, N]"), (128,), ())[-1] == {"A": 1, "M": 128, "N": 128}
    assert of(inputs.parse("x[M, N%8]"), (1 << 15,), ())[-1] == {"M": 1, "N": 1 << 15}
    assert of(inputs.parse("x[M, N%8]"), (1 << 20,), ())[-1] == {"M": 1, "N": 8}


def test_sizes_apart_are_nobody_elses():
    text = inputs.parse("x[M, K%8]")
    chosen = input_sizes.choices(text, (16, 17, 24), "full", 0)
    found = input_sizes.apart(text, chosen)
    assert found["K"] % 8 == 0
    assert all(c["M"] != found["M"] and c["K"] != found["K"] for c in chosen)


@pytest.mark.parametrize("text", ["x[A, B, C, D]", "x[A%8, B%16, C]", "x[A] y[A, B] z[B, A, B]"])
@pytest.mark.parametrize("level", ["quick", "full", "soak"])
def test_no_choice_is_larger_than_its_level_bears(text, level):
    parsed = inputs.parse(text)
    most = {"quick": 1 << 14, "full": 1 << 17, "soak": 1 << 19}[level]
    chosen = input_sizes.choices(parsed, (16, 128), level, 3)
    assert len(chosen) > 3
    for sizes in chosen:
        # what is larger has one letter beyond a large tile, and the least of the others
        others = [size for size in sizes.values() if size != max(sizes.values())]
        small = all(
            size <= parsed.multiples.get(letter, 1)
            for letter, size in sizes.items()
            if size in others
        )
        assert parsed.elements(sizes) <= (4 * most if small else most)
    assert parsed.elements(input_sizes.apart(parsed, chosen)) <= most


def test_where_nothing_is_small_enough_the_smallest_is_tried():
    parsed = inputs.parse("x[A%256, B%256]")
    assert input_sizes.choices(parsed, (16,), "quick", 0) == [{"A": 256, "B": 256}]


def test_a_pinned_text_makes_the_same_call():
    parsed = inputs.parse("x[M, K%4] index[M]:int64<K eps=1e-5 N=3 y[N]")
    sizes = {"M": 5, "K": 8}
    again = inputs.parse(parsed.pinned(sizes))
    assert again.letters == ()
    assert again.fixed == {"N": 3, "M": 5, "K": 8}
    (alone,) = input_sizes.choices(again, (16,), "full", 0)
    one, other = parsed.sample(sizes, Maker()), again.sample(alone, Maker())
    assert one.arguments.keys() == other.arguments.keys()
    for name, value in one.arguments.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, other.arguments[name])


def softmax(x):
    return torch.softmax(x, -1)


def rms_norm(x, weight):
    return x * x.square().mean(-1, keepdim=True).rsqrt() * weight


def add(x, y):
    return x + y


def matmul(a, b):
    return a @ b


def linear(x, weight, bias):
    return F.linear(x, weight, bias)


def layer_norm(x, weight, bias, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def cross_entropy(logits, target):
    return F.cross_entropy(logits, target)


def embedding(index, weight):
    return weight[index]


def pool(x):
    return F.max_pool2d(x, 2)


def outer(x, y):
    return torch.outer(x, y)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (softmax, "x[M, N]"),
        (pool, "x[N, C, H, W]"),
        (add, "x[M, N] y[M, N]"),
        (matmul, "a[M, K] b[K, N]"),
        (outer, "x[N] y[N]"),
        (rms_norm, "x[M, N] weight[N]"),
        (cross_entropy, "logits[M, V] target[M]:int64<V"),
        (embedding, "index[M]:int64<V weight[V, D]"),
        (linear, "x[M, K] weight[N, K] bias[N]"),
        (layer_norm, "x[M, N] weight[N] bias[N]"),
        (attention, "q[B, H, M, D] k[B, H, N, D] v[B, H, N, D]"),
    ],
    ids=lambda one: one.__name__ if callable(one) else "",
)
def test_common_functions_are_guessed(function, text):
    assert input_guess.guess(function, function) == text


def test_a_reference_may_have_other_names():
    assert input_guess.guess(matmul, torch.matmul) == "a[M, K] b[K, N]"


def test_what_cannot_be_guessed_is_said():
    def strange(x, y, z, w):
        return x

    with pytest.raises(ValueError, match=r"strange\(x, y, z, w\) takes cannot be guessed: say"):
        input_guess.guess(strange, strange)

    def refusing(x):
        raise RuntimeError

    with pytest.raises(ValueError, match=r"refusing\(x\) takes cannot be guessed"):
        input_guess.guess(refusing, refusing)
