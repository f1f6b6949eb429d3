"""ONNX: the network for its window, and what turns logits into labels, each as a graph that ONNX Runtime was seen to compute alike."""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim

from mstkd.errors import UserError
from mstkd.export.facts import StudentFacts, write_facts
from mstkd.export.window import LabelRule, WindowNetwork, checked, example, tried_subsets
from mstkd.trained_run import TrainedRun

NEEDED = ("onnx", "onnxscript", "onnxruntime")
LABELS = "labels.onnx"


def write_onnx(run: TrainedRun, facts: StudentFacts, folder: Path) -> None:
    """<network>.onnx, labels.onnx and mstkd.json, which both graphs also hold among their metadata.

    The network: image (B, M, X, Y, Z) float32 in the method's intensities and available (B, M) bool to logits (B, K, X, Y, Z), for windows of
    `facts.window` and any subset. The labels: logits (B, K, X, Y, Z) of any size to a label map (B, X, Y, Z) uint8. Both are compared with
    torch before they are kept. Raises UserError: a package is missing, a method that cannot be a graph, a graph that computes something else.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"export format onnx: {missing[0]} is not installed; pip install 'mstkd[onnx]'")
    method, name = run.method, facts.network
    module, (image, available) = WindowNetwork(method, name), example(len(facts.sequences), facts.window)
    with torch.no_grad():
        logits = module(image, available)
    network = graph_of(module, {"image": image, "available": available}, {"image": {0: "batch"}, "available": {0: "batch"}}, "logits")
    rule = graph_of(LabelRule(method), {"logits": logits}, {"logits": {0: "batch", 2: "x", 3: "y", 4: "z"}}, "labels")
    for graph, file in ((network, f"{name}.onnx"), (rule, LABELS)):
        _describe(graph, facts)
        (folder / file).write_bytes(graph.SerializeToString())
    found = checked(method, name, image, tried_subsets(method, facts.sequences), runner(folder / f"{name}.onnx"))
    if not torch.equal(runner(folder / LABELS)(logits), method.to_labels(logits)):
        raise UserError(f"{LABELS}: ONNX Runtime draws other labels than torch; nothing was written")
    write_facts(facts, folder)
    Console().print(f"{name}.onnx: {found}", highlight=False, soft_wrap=True)


def graph_of(module: nn.Module, inputs: dict[str, Tensor], sizes: dict[str, dict[int, str]], output: str):
    """An ONNX model (ModelProto) of `module`, by names of inputs and of its output, without what the exporter notes of files and lines.

    `sizes`: which axes of an input may have any size, and what these are called.
    """
    dims = {name: Dim(name) for axes in sizes.values() for name in axes.values()}
    shapes = {name: {axis: dims[size] for axis, size in axes.items()} for name, axes in sizes.items()}
    doubled = tuple(torch.cat([tensor, tensor]) for tensor in inputs.values())  # a batch of 1 would be taken for the only one
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, doubled, dynamic_shapes=shapes, strict=False)
        model = torch.onnx.export(program, input_names=list(inputs), output_names=[output], dynamo=True, verbose=False).model_proto
    del model.metadata_props[:]
    for graph in (model.graph, *model.functions):
        for part in (graph, *graph.node, *graph.value_info):
            part.doc_string = ""
            del part.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    return model


def _describe(model, facts: StudentFacts) -> None:
    import onnx

    model.producer_name, model.producer_version = "mstkd", facts.mstkd
    described = {
        "mstkd": facts.model_dump_json(), "sequences": ",".join(facts.sequences), "window": ",".join(map(str, facts.window)),
        "labels": facts.label_scheme.model_dump_json(), "intensity": facts.intensity.model_dump_json(),
    }  # fmt: skip
    onnx.helper.set_model_props(model, described)
    onnx.checker.check_model(model)


def runner(model: Path | bytes) -> Callable[..., Tensor]:
    """A graph, or the one in a file, as ONNX Runtime computes it on the processor."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]
    return lambda *tensors: torch.from_numpy(session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
