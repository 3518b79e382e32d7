"""`nn.MultiheadAttention` opened for its weights: against PyTorch's own, in every option, and against products written out."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.quant.conversion.attention import OpenAttention, open_attention

pytestmark = pytest.mark.usefixtures("one_thread")
N, L, S, E, HEADS = 3, 5, 7, 12, 3


def opened(module):
    result = copy.deepcopy(module)
    open_attention(result)
    return result


def layer(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, HEADS, **options).eval()
    for parameter in module.parameters():  # biases start at zero
        nn.init.normal_(parameter, std=0.4)
    return module


def inputs(module, batched=True):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(N, length, width, generator=generator)
              for length, width in ((L, E), (S, module.kdim), (S, module.vdim))]
    if not batched:
        return [x[0] for x in tokens]
    return tokens if module.batch_first else [x.transpose(0, 1) for x in tokens]


def masks(kind, padding, batched=True):
    """Masks that leave a key to every query."""
    generator, options = torch.Generator().manual_seed(2), {}
    images = N if batched else 1
    if kind:
        shape = (L, S) if "2D" in kind else (images * HEADS, L, S)
        attn = torch.rand(shape, generator=generator) < 0.4
        attn[..., 0] = False
        options["attn_mask"] = attn if "bool" in kind else torch.randn(shape, generator=generator).masked_fill(attn, -math.inf)
    if padding:
        pad = torch.arange(S) >= torch.tensor([[S], [S - 2], [2]])
        pad = pad if padding == "bool" else torch.zeros(N, S).masked_fill(pad, -math.inf)
        options["key_padding_mask"] = pad if batched else pad[1]
    return options


KINDS = {"plain": {}, "batch first": dict(batch_first=True), "no bias": dict(bias=False), "other widths": dict(kdim=5, vdim=8),
         "own keys": dict(add_bias_kv=True, add_zero_attn=True, batch_first=True), "zero key": dict(add_zero_attn=True)}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_gives_what_pytorch_gives(kind):
    module = layer(**KINDS[kind])
    ours = opened(module)
    assert type(ours) is OpenAttention and type(module) is nn.MultiheadAttention
    assert list(ours.state_dict()) == list(module.state_dict())
    attn_masks = [None, "2D bool", "2D float", "3D bool", "3D float"]
    for attn, padding, weights, average, batched in itertools.product(
            attn_masks, [None, "bool", "float"], [True, False], [True, False], [True, False]):
        options = dict(need_weights=weights, average_attn_weights=average, **masks(attn, padding, batched))
        x = inputs(module, batched)
        with torch.no_grad():
            wanted, found = module(*x, **options), ours(*x, **options)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=2e-6, msg=f"{options}")
        assert (found[1] is None) == (wanted[1] is None)
        if weights:
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-6)


def test_the_equation_written_out_in_float64():
    """Not PyTorch's: each head by itself, each product a sum."""
    module = opened(layer(batch_first=True))
    x = inputs(module)
    found, weights = module(*x, average_attn_weights=False)
    matrices, biases = module.in_proj_weight.double().view(3, E, E), module.in_proj_bias.double().view(3, E)
    q, k, v = (torch.einsum("nti,oi->nto", t.double(), w) + b for t, w, b in zip(x, matrices, biases))
    heads, d = [], E // HEADS
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)
        scores = torch.exp(torch.einsum("nld,nsd->nls", q[..., part], k[..., part]) / d**0.5)
        share = scores / scores.sum(2, keepdim=True)
        torch.testing.assert_close(weights[:, head].double(), share, rtol=1e-4, atol=1e-6)
        heads.append(torch.einsum("nls,nsd->nld", share, v[..., part]))
    wanted = torch.einsum("nti,oi->nto", torch.cat(heads, 2), module.out_proj.weight.double()) + module.out_proj.bias.double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "own keys"])
@pytest.mark.parametrize("weights", [True, False])
def test_causal_hint_dropout_and_gradients(kind, weights):
    """In training, with the same seed the same elements are dropped; the hint is_causal replaces the mask where there is one."""
    module = layer(dropout=0.3, **KINDS[kind]).train()
    ours = opened(module)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    results = []
    for each in (module, ours):
        x = inputs(module)[0].requires_grad_()
        torch.manual_seed(5)
        y, share = each(x, x, x, attn_mask=causal, is_causal=True, need_weights=weights)
        y.square().sum().backward()
        results.append([y, share, x.grad, *(p.grad for p in each.parameters())])
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    first, second = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    with pytest.raises(RuntimeError, match="is_causal"):
        ours(x, x, x, is_causal=True)


class Watched(nn.Parameter):
    """A weight that notes which function used it, as one on crossbars does."""

    seen = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if function is F.linear:
            cls.seen.append(tuple(args[1].shape))
        return tuple(part.as_subclass(cls) for part in result) if function is torch.Tensor.chunk else result


@pytest.mark.parametrize("kind, shapes", [("plain", [(E, E)] * 4), ("other widths", [(E, E), (E, 5), (E, 8), (E, E)])])
def test_every_weight_is_used_by_a_linear_of_its_own(kind, shapes):
    module = opened(layer(**KINDS[kind]))
    for owner, name in ((module, "in_proj_weight"), (module, "q_proj_weight"), (module, "k_proj_weight"), (module, "v_proj_weight"),
                        (module.out_proj, "weight")):
        if getattr(owner, name) is not None:
            setattr(owner, name, Watched(getattr(owner, name).detach()))
    Watched.seen.clear()
    module(*inputs(module))
    assert Watched.seen == shapes


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_leaves_its_fast_paths(norm_first):
    """In inference, without gradients, with a padding mask: PyTorch takes nested tensors and one kernel for a whole layer."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 20, batch_first=True, norm_first=norm_first), 2,
                                    enable_nested_tensor=not norm_first).eval()
    ours, calls = opened(encoder), []
    for module in ours.layers:
        module.self_attn.register_forward_hook(lambda *_: calls.append(1))
    x, padding = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([[6], [4], [1]])
    for each in ({}, dict(src_key_padding_mask=padding), dict(mask=nn.Transformer.generate_square_subsequent_mask(6), is_causal=True)):
        calls.clear()
        bare = opened(encoder)  # hooks alone close one of the fast paths
        with torch.no_grad():
            wanted, found = encoder(x, **each), ours(x, **each)
            assert torch.equal(bare(x, **each), found)
        kept = ~each.get("src_key_padding_mask", torch.zeros(3, 6, dtype=torch.bool))
        torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-5)
        assert len(calls) == 2


def test_decoder_and_vision_transformer():
    torch.manual_seed(0)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 20, dropout=0), 2).eval()
    target, memory = torch.randn(5, 2, 16), torch.randn(6, 2, 16)
    options = dict(tgt_mask=nn.Transformer.generate_square_subsequent_mask(5), tgt_is_causal=True,
                   memory_key_padding_mask=torch.arange(6) >= torch.tensor([[6], [3]]))
    from torchvision.models import vision_transformer
    vit = vision_transformer.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=10).eval()  # vit_b_16, small
    nn.init.normal_(vit.heads.head.weight)
    with torch.no_grad():
        torch.testing.assert_close(opened(decoder)(target, memory, **options), decoder(target, memory, **options), rtol=1e-4, atol=1e-5)
        image = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(opened(vit)(image), vit(image), rtol=1e-4, atol=1e-4)


def test_only_the_class_itself_is_opened_and_copies_stay_open():
    class Own(nn.MultiheadAttention):
        pass

    module = opened(nn.ModuleList([Own(8, 2), nn.MultiheadAttention(8, 2)]))
    assert type(module[0]) is Own and module[0]._qkv_same_embed_dim
    assert type(copy.deepcopy(module)[1]) is OpenAttention


@pytest.mark.parametrize("options, message", [
    (dict(attn_mask=torch.zeros(L, S - 1)), r"attn_mask is torch.float32 of shape \[5, 6\]; .* \[5, 7\] or \[9, 5, 7\]"),
    (dict(attn_mask=torch.zeros(L, S, dtype=torch.uint8)), "attn_mask is torch.uint8"),
    (dict(key_padding_mask=torch.zeros(S, N)), r"key_padding_mask is torch.float32 of shape \[7, 3\]; .* \[3, 7\]")])
def test_wrong_masks_are_refused(options, message):
    module = opened(layer())
    with pytest.raises(ValueError, match=message):
        module(*inputs(module), **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    x = torch.nested.nested_tensor([torch.zeros(2, E), torch.zeros(4, E)])
    with pytest.raises(ValueError, match="attention on crossbars takes no nested tensors"):
        opened(layer(batch_first=True))(x, x, x)


def test_a_causal_hint_leaves_padded_keys_out():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    ours, x = copy.deepcopy(module), torch.randn(3, 5, 8)
    open_attention(ours)
    padded = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    options = dict(attn_mask=nn.Transformer.generate_square_subsequent_mask(5), is_causal=True, need_weights=False,
                   key_padding_mask=torch.zeros(3, 5).masked_fill(padded, float("-inf")))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, x, x, **options)[0], module(x, x, x, **options)[0], rtol=1e-4, atol=1e-6)


def test_masks_of_another_type_than_the_network():
    torch.manual_seed(0)
    module, x, mask = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8), torch.randn(5, 5)
    open_attention(module)
    with torch.no_grad():
        wanted = module(x, x, x, attn_mask=mask)[0]
        found = module.bfloat16()(*[x.bfloat16()] * 3, attn_mask=mask)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.02)
