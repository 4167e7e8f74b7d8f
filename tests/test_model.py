"""model.py: the network against a functional re-statement, frozen means frozen, weights from elsewhere."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0

import model as models
from conftest import B0_STAGES, backbone, shallow_efficientnet
from model import EfficientSegNet, SegNetDecoder, WeightsError, fold_batch_norms


@pytest.fixture(scope="module")
def network():
    """A network whose batch-norm statistics are not those of a fresh one, so that leaving one out shows."""
    torch.manual_seed(1)
    network = EfficientSegNet(20, "none").eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(layer.bias, 0, 0.1)
    return network


def restated(weights, x):
    """EfficientSegNet.eval() written down again, from the papers and the state_dict alone."""
    def batch_norm(x, name, eps=1e-5):
        return F.batch_norm(x, weights[f"{name}.running_mean"], weights[f"{name}.running_var"],
                            weights[f"{name}.weight"],
                            weights[f"{name}.bias"], eps=eps)

    def conv_norm(x, name, stride=1, groups=1):
        kernel = weights[f"{name}.0.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        return batch_norm(x, f"{name}.1")

    def silu(x):
        return x * torch.sigmoid(x)

    def inverted_residual(x, name, expansion, stride):
        before, part = x, 0
        if expansion > 1:
            x, part = silu(conv_norm(x, f"{name}.block.0")), 1
        x = silu(conv_norm(x, f"{name}.block.{part}", stride, groups=x.shape[1]))
        squeezed = x.mean(dim=(2, 3), keepdim=True)
        for layer, activation in (("fc1", silu), ("fc2", torch.sigmoid)):
            name_fc = f"{name}.block.{part + 1}.{layer}"
            kernel, bias = weights[f"{name_fc}.weight"], weights[f"{name_fc}.bias"]
            squeezed = activation(F.conv2d(squeezed, kernel, bias))
        x = conv_norm(x * squeezed, f"{name}.block.{part + 2}")
        return x + before if stride == 1 and x.shape == before.shape else x

    def stage(x, name, number):
        expansion, _, stride, _, _, repeats = B0_STAGES[number - 1]
        for block in range(repeats):
            x = inverted_residual(x, f"{name}.{block}", expansion, stride if block == 0 else 1)
        return x

    def decoder(x, name, skip=None):
        kernel, bias = weights[f"{name}.upsampler.weight"], weights[f"{name}.upsampler.bias"]
        x = F.conv_transpose2d(x, kernel, bias, stride=2)
        if skip is not None:
            x = x + F.interpolate(skip, size=x.shape[2:], mode="bilinear", align_corners=False)
        kernel, bias = weights[f"{name}.conv_block.0.weight"], weights[f"{name}.conv_block.0.bias"]
        x = F.conv2d(x, kernel, bias, padding=1)
        return batch_norm(x, f"{name}.conv_block.1").relu()

    x = silu(conv_norm(x, "encoder1.0", stride=2))
    x1 = stage(stage(x, "encoder1.1", 1), "encoder1.2", 2)
    x2 = stage(x1, "encoder2", 3)
    x3 = stage(x2, "encoder3", 4)
    x4 = stage(x3, "encoder4", 5)
    x5 = silu(conv_norm(stage(stage(x4, "encoder5.0", 6), "encoder5.1", 7), "encoder5.2"))
    x = decoder(x5, "decoder5", x4)
    x = decoder(x, "decoder4", x3)
    x = decoder(x, "decoder3", x2)
    x = decoder(x, "decoder2", x1)
    x = decoder(x, "decoder1")
    return F.conv2d(x, weights["out.weight"], weights["out.bias"])


def test_parameter_counts_are_the_contract():
    network = EfficientSegNet(20, "none")
    assert sum(parameter.numel() for parameter in network.encoder_parameters()) == 4_007_548
    assert sum(parameter.numel() for parameter in network.decoder_parameters()) == 825_108
    assert {name.split(".")[0] for name in network.state_dict()} == (
        {f"encoder{i}" for i in range(1, 6)} | {f"decoder{i}" for i in range(1, 6)} | {"out"})


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 3, 96, 160)])
def test_forward_equals_the_restated_architecture(network, shape):
    images = torch.randn(shape)
    with torch.no_grad():
        logits, expected = network(images), restated(network.state_dict(), images)
    assert logits.shape == (shape[0], 20, *shape[2:])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert logits.std() > 0.01  # a network of zeros would agree with anything


def test_decoder_resizes_its_skip_and_does_without():
    decoder = SegNetDecoder(6, 4)
    assert decoder(torch.randn(1, 6, 5, 7), torch.randn(1, 4, 3, 3)).shape == (1, 4, 10, 14)
    assert decoder(torch.randn(1, 6, 5, 7)).shape == (1, 4, 10, 14)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 3), (8, 8)])
def test_one_kernel_is_upsampling_and_convolution_with_every_gradient(shape):
    """In float64, at the borders too, against the two steps one after the other."""
    torch.manual_seed(0)
    upsampler = torch.nn.ConvTranspose2d(5, 4, 2, stride=2).double()
    conv = torch.nn.Conv2d(4, 3, 3, padding=1).double()
    x = torch.randn(2, 5, *shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, *upsampler.parameters(), *conv.parameters()]
    one, two = models.upsample_and_convolve(x, upsampler, conv), conv(upsampler(x))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(two)
    for left, right in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (one, two))):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_the_kernel_is_formed_in_float32_under_autocast():
    upsampler, conv = torch.nn.ConvTranspose2d(5, 4, 2, stride=2), torch.nn.Conv2d(4, 3, 3, padding=1)
    x = torch.randn(1, 5, 6, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = models.upsample_and_convolve(x, upsampler, conv)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), conv(upsampler(x.float())), rtol=0.02, atol=0.02)


def test_forward_is_decode_after_encode(network):
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = network.encode(images)
        shapes = [tuple(one.shape[1:]) for one in features]
        assert shapes == [(24, 16, 24), (40, 8, 12), (80, 4, 6), (112, 4, 6), (1280, 2, 3)]
        assert torch.equal(network.decode(features), network(images))


def test_folded_batch_norms_give_the_same_logits(network):
    images, folded = torch.randn(2, 3, 64, 64), fold_batch_norms(copy.deepcopy(network))
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(folded(images), network(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("move", [lambda net: net.double(), lambda net: net.to(torch.float64).cpu()])
def test_a_folded_network_follows_its_dtype_and_device(network, move):
    """None of it is hidden from .to(), as a tuple of modules would be."""
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    moved = move(fold_batch_norms(copy.deepcopy(network)))
    floats = [tensor for tensor in moved.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float64}
    with torch.no_grad():
        logits = moved(images)
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits.float(), network(images.float()), rtol=1e-3, atol=1e-4)


def train_a_little(network):
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    network.train()
    for _ in range(2):
        loss = F.cross_entropy(network(torch.randn(2, 3, 64, 64)), torch.randint(20, (2, 64, 64)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_frozen_encoder_never_changes_and_keeps_no_graph():
    network = EfficientSegNet(20, "none")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    train_a_little(network)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith("encoder")}
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    assert all(not features.requires_grad for features in network.encode(images))


def test_finetuning_changes_all_of_the_encoder_without_stochastic_depth():
    network = EfficientSegNet(20, "none", finetune_encoder=True)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {nn.BatchNorm2d(1).momentum}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    train_a_little(network)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(before)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network(images), network(images))  # in train mode too


def test_depthwise_convolutions_stay_in_float32_under_bf16():
    network = EfficientSegNet(20, "none", finetune_encoder=True)
    layer = network.encoder5[0][0].block[1][0]
    x = torch.randn(2, layer.in_channels, 8, 8).bfloat16()
    options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    expected = F.conv2d(x.float(), layer.weight, **options)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert not torch.equal(F.conv2d(x, layer.weight, **options), y)  # bf16 rounds the weights
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())


def test_encoder_weights_from_a_file_with_and_without_classifier(tmp_path):
    backbone = efficientnet_b0()
    torch.save(backbone.state_dict(), tmp_path / "whole.pth")
    features = {k: v for k, v in backbone.state_dict().items() if k.startswith("features.")}
    torch.save(features, tmp_path / "features.pth")
    for name in ("whole.pth", "features.pth"):
        network = EfficientSegNet(3, tmp_path / name)
        assert torch.equal(network.encoder5[2][0].weight, backbone.features[8][0].weight)
        first = backbone.features[1][0].block[0][0].weight
        assert torch.equal(network.encoder1[1][0].block[0][0].weight, first)


def test_failed_download_names_file_place_and_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(WeightsError) as error:
        EfficientSegNet(20, "imagenet")
    name = EfficientNet_B0_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    assert str(tmp_path / "hub" / "checkpoints" / name) in str(error.value)
    assert "--encoder_weights FILE" in str(error.value) and "no network" in str(error.value)


def wrapped_in_module(state_dict):
    return {f"module.{key}": value for key, value in state_dict.items()}


def with_base_model(state_dict):
    return state_dict | {f"base_model.{key}": value for key, value in efficientnet_b0().state_dict().items()}


SPELLINGS = {
    "ours": lambda own: {"model": own, "config": {"image_size": 128}},
    "bare": lambda own: own,
    "base_model": with_base_model,
    "data_parallel": lambda own: wrapped_in_module(with_base_model(own)),
    "wrapped": lambda own: {"state_dict": wrapped_in_module(own), "epoch": 3},
    "compiled": lambda own: {f"_orig_mod.{key}": value for key, value in own.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_checkpoints_of_other_trainings_are_accepted(network, tmp_path, spelling):
    own, path, images = network.state_dict(), tmp_path / "checkpoint.pth", torch.randn(1, 3, 64, 64)
    torch.save(SPELLINGS[spelling](own), path)
    checkpoint = models.load_checkpoint(path)
    loaded = models.model_from_checkpoint(checkpoint, path).eval()
    assert list(loaded.state_dict()) == list(own)
    assert checkpoint["config"] == ({"image_size": 128} if spelling == "ours" else {})
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))


class Malicious:
    """Opens a file when it is unpickled."""

    def __init__(self, path):
        self.path = path.with_suffix(".pwned")

    def __reduce__(self):
        return open, (str(self.path), "w")


def save_half(network, path):
    torch.save(network.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NO_CHECKPOINTS = {
    "other": lambda network, path: torch.save({"out.weight": torch.zeros(20, 24, 1, 1)}, path),
    "shape": lambda network, path: torch.save(
        network.state_dict() | {"encoder1.0.0.weight": torch.zeros(1)}, path),
    "backbone": lambda network, path: torch.save(efficientnet_b0().state_dict(), path),
    "list": lambda network, path: torch.save([1, 2], path),
    "truncated": save_half,
    "empty": lambda network, path: path.write_bytes(b""),
    "text": lambda network, path: path.write_text("not a checkpoint"),
    "folder": lambda network, path: path.mkdir(),
    "absent": lambda network, path: None,
    "malicious": lambda network, path: torch.save(
        {"model": network.state_dict(), "x": Malicious(path)}, path),
    "pickle": lambda network, path: path.write_bytes(pickle.dumps(Malicious(path))),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_in_one_line(network, tmp_path, kind):
    path = tmp_path / "checkpoint.pth"
    NO_CHECKPOINTS[kind](network, path)
    with pytest.raises(WeightsError) as error:
        models.model_from_checkpoint(models.load_checkpoint(path), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not path.with_suffix(".pwned").exists()


def test_encoder_weights_of_another_network_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match="not a torchvision efficientnet_b0 state_dict"):
        EfficientSegNet(20, tmp_path / "resnet.pth")


def exported(network, folder):
    """The README's torch.export lines, with a batch of any size."""
    images = torch.randn(2, 3, 64, 64)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()


def traced(network, folder):
    torch.jit.trace(network, torch.randn(1, 3, 64, 64)).save(folder / "model.ts")
    return torch.jit.load(folder / "model.ts")


def onnx_exported(network, folder):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        reason = "ONNX is exported only where onnx, onnxscript and onnxruntime are installed"
        pytest.importorskip(name, reason=reason)
    import onnxruntime
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(network, (torch.randn(2, 3, 64, 64),), folder / "model.onnx", dynamo=True,
                      dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


@pytest.mark.parametrize("export", [exported, traced, onnx_exported])
def test_an_exported_network_gives_the_same_logits(tmp_path, export):
    with backbone(shallow_efficientnet):  # the same kinds of layers, in half the time
        network = fold_batch_norms(EfficientSegNet(20, "none"))
    again = export(network, tmp_path)
    with torch.no_grad():
        for n_images in (1, 3) if export is not traced else (1,):
            images = torch.randn(n_images, 3, 64, 64)
            torch.testing.assert_close(again(images), network(images), rtol=1e-4, atol=1e-4)


def test_random_encoder_keeps_its_signal():
    torch.manual_seed(0)
    photo_like = F.interpolate(torch.randn(2, 3, 8, 8), size=(128, 128), mode="bilinear")
    for features in EfficientSegNet(20, "none").encode(photo_like):
        assert 0.05 < features.std() < 20
