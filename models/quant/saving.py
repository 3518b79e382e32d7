"""Networks on crossbars as files: `save(network, path)`, and `load(path, model)`, which sees no images.

    save(convert(model, spec, images), "network.pt")
    network = load("network.pt", model)     # the model that was converted, with whatever weights

A file holds the network's state, in the order of memory that its tensors have, the hardware of each layer, and what tells the network from
others (`structure`). It is read with `weights_only`, so that it can run no code.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arrays.spec import CrossbarSpec
from .conversion.installing import bound_again, facts_of
from .conversion.report import ConversionReport
from .layers.crossbar import crossbar_layers
from .layers.on_arrays import ADC_BUFFERS
from .network.structure import structure
from .storage.bitplanes import load_file
from .storage.files import atomic_write
from .version import __version__

FORMAT = "a network on crossbars, 2"  # raise the number where a reader of before would take it for what it is not


def save(network: nn.Module, path: str | Path) -> None:
    """Write a network on crossbars, converted or calibrated, to a file that `load` reads. The file is written whole or not at all.

    Raises: ValueError for a network without crossbars, on a chip, or with codes in place of its weights; OSError where the file cannot
        be written.
    """
    network = getattr(network, "_orig_mod", network)  # under torch.compile
    layers = crossbar_layers(network)
    if not layers:
        raise ValueError("this network has no layers on crossbars; for others there is torch.save(network.state_dict(), path)")
    for name, layer in layers:
        if layer.chip is not None:
            raise ValueError(f"layer {name} is on a chip, and the file does not hold chips; write its cells with write_cells, then call "
                             "program(network, None) and save the network")
        if layer._w_codes is not None:
            raise ValueError(f"layer {name} has codes in place of its weights (set_codes), and the file does not hold those; call "
                             "set_codes(None), then save the network")
    state = network.state_dict()
    if odd := next((name for name, value in state.items() if not isinstance(value, Tensor)), None):
        raise ValueError(f"{odd} in the state of this network is not a tensor, and the file holds tensors only")
    report = getattr(network, "crossbar_report", None)
    content = {
        "format": FORMAT, "torchrram": __version__, "modules": _modules(network),
        "specs": {name: asdict(layer.spec) for name, layer in layers}, "report": report and report.as_dict(),
        "layers": report and facts_of(network),
        "state": {name: value.detach().cpu().clone(memory_format=torch.preserve_format) for name, value in state.items()}}
    atomic_write(path, lambda file: torch.save(content, file))


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """The network that `save` wrote, in evaluation mode. On a like machine it has the same outputs, bit for bit.

    Args: model, one with the same modules; its weights do not matter. A model with layers on crossbars is filled and returned itself. Of
        any other one, the network that was converted, a converted copy is returned.
    Raises: ValueError for a file of something else, of another network, or that is damaged; OSError where it cannot be read.
    """
    content = _read(path)
    try:
        if content["report"] and not crossbar_layers(model):
            model = bound_again(model, content["layers"])
            model.crossbar_report = ConversionReport(**content["report"])
            for layer in model.crossbar_report.layers:
                if "arrays" in layer:  # as files of before call them
                    layer["row_blocks"] = layer.pop("arrays")
        _check(model, content)
        return _filled(model, content)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0] if isinstance(error, ValueError) else f"it is damaged ({type(error).__name__})"
        raise ValueError(f"{path} cannot be loaded into this network: {line}") from error


def _read(path: str | Path) -> dict[str, Any]:
    with open(path, "rb"):  # what cannot be read says so itself
        pass
    try:
        content = load_file(path)
        known = content["format"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a file that save(network, path) wrote") from error
    if known != FORMAT:
        raise ValueError(f"{path} holds {known!r}, and this version of torchrram reads {FORMAT!r}")
    return content


def _modules(network: nn.Module) -> dict[str, dict[str, Any]]:
    """The structure of a network, without what modules of others count or remember."""
    modules, known = dict(network.named_modules()), ("torch.nn.", __name__.rpartition(".")[0])
    return {name: facts if type(modules[name]).__module__.startswith(known) else {"class": facts["class"]}
            for name, facts in structure(network).items()}


def _check(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Refuse another network. Raises: ValueError."""
    own, state = _modules(model), _without_ranges(model.state_dict())
    there, wanted = content["modules"], _without_ranges(content["state"])
    for what, left, right in (("module", own, there), ("tensor", state, wanted)):
        if different := sorted(left.keys() ^ right.keys()):
            name = different[0]
            raise ValueError(f"it is of another network: {what} {name!r} is in the {'file' if name in right else 'network'} alone")
    for name, facts in there.items():
        for key in facts.keys() & own[name].keys():  # modules of another version of PyTorch may have more
            if own[name][key] != facts[key]:
                raise ValueError(f"it is of another network: {key} of {name or 'the whole'} is {facts[key]!r} in the file, and "
                                 f"{own[name][key]!r} here")
    for name, value in wanted.items():
        if (state[name].shape, state[name].dtype) != (value.shape, value.dtype):
            raise ValueError(f"it is of another network: {name} is {list(value.shape)} of {value.dtype} in the file, and "
                             f"{list(state[name].shape)} of {state[name].dtype} here")


def _filled(model: nn.Module, content: Mapping[str, Any]) -> nn.Module:
    state = content["state"]
    with torch._C.DisableTorchFunctionSubclass():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.shape == state[name].shape and tensor.stride() != state[name].stride():  # float sums depend on it
                tensor.data = torch.empty_strided(tensor.shape, state[name].stride(), dtype=tensor.dtype, device=tensor.device)
    model.load_state_dict(_without_ranges(state), strict=False)  # with the windows of inputs, which a spec is fitted to
    for name, layer in crossbar_layers(model):
        layer.set_spec(CrossbarSpec(**content["specs"][name]))
    model.load_state_dict(state)
    return model.eval()


def _without_ranges(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith(ADC_BUFFERS)}
