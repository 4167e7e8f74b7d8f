"""model.py: the network against a functional re-statement, frozen means frozen, weights from elsewhere."""
import copy
import pickle
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import EfficientNet_B0_Weights

import model as models
from conftest import B0_STAGES, backbone, shallow_efficientnet
from model import EfficientSegNet, SegNetDecoder, WeightsError, fold_batch_norms


@pytest.fixture(scope="module")
def network():
    """A network whose batch-norm statistics are not those of a fresh one, so that leaving one out shows."""
    torch.manual_seed(1)
    network = EfficientSegNet(20, "none").eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
            nn.init.normal_(layer.bias, 0, 0.1)
    return network


@pytest.fixture
def shallow():
    """A network with fewer layers of the same kinds, as all have that are made meanwhile."""
    with backbone(shallow_efficientnet):
        yield EfficientSegNet(20, "none").eval()


def restated(weights, x):
    """EfficientSegNet.eval() written down again, from the papers and the state_dict alone."""
    def batch_norm(x, name, eps=1e-5):
        return F.batch_norm(x, weights[f"{name}.running_mean"], weights[f"{name}.running_var"],
                            weights[f"{name}.weight"], weights[f"{name}.bias"], eps=eps)

    def conv_norm(x, name, stride=1, groups=1):
        kernel = weights[f"{name}.0.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        return batch_norm(x, f"{name}.1")

    def inverted_residual(x, name, expansion, stride):
        before, part = x, 0
        if expansion > 1:
            x, part = F.silu(conv_norm(x, f"{name}.block.0")), 1
        x = F.silu(conv_norm(x, f"{name}.block.{part}", stride, groups=x.shape[1]))
        squeezed = x.mean(dim=(2, 3), keepdim=True)
        for layer, activation in (("fc1", F.silu), ("fc2", torch.sigmoid)):
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

    x = F.silu(conv_norm(x, "encoder1.0", stride=2))
    x1 = stage(stage(x, "encoder1.1", 1), "encoder1.2", 2)
    x2 = stage(x1, "encoder2", 3)
    x3 = stage(x2, "encoder3", 4)
    x4 = stage(x3, "encoder4", 5)
    x5 = F.silu(conv_norm(stage(stage(x4, "encoder5.0", 6), "encoder5.1", 7), "encoder5.2"))
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


def test_forward_equals_the_restated_architecture(network):
    images = torch.randn(2, 3, 96, 160)
    exact = {name: tensor.double() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        logits, expected = network(images), restated(exact, images.double())
    assert logits.shape == (2, 20, 96, 160)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-4)
    assert logits.std() > 0.01  # a network of zeros would agree with anything


def test_a_decoder_resizes_its_skip_features():
    decoder = SegNetDecoder(6, 4)
    assert decoder(torch.randn(1, 6, 5, 7), torch.randn(1, 4, 3, 3)).shape == (1, 4, 10, 14)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3)])
def test_one_kernel_is_upsampling_and_convolution_with_every_gradient(shape):
    """In float64, at the borders too, against the two steps one after the other."""
    torch.manual_seed(0)
    upsampler = nn.ConvTranspose2d(5, 4, 2, stride=2).double()
    conv = nn.Conv2d(4, 3, 3, padding=1).double()
    x = torch.randn(2, 5, *shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, *upsampler.parameters(), *conv.parameters()]
    one, two = models.upsample_and_convolve(x, upsampler, conv), conv(upsampler(x))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(two)
    for left, right in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (one, two))):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_the_kernel_is_formed_in_float32_under_autocast():
    upsampler, conv = nn.ConvTranspose2d(5, 4, 2, stride=2), nn.Conv2d(4, 3, 3, padding=1)
    x = torch.randn(1, 5, 6, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = models.upsample_and_convolve(x, upsampler, conv)
    assert y.dtype == torch.bfloat16
    expected = conv.double()(upsampler.double()(x.double()))
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)


def test_forward_is_decode_after_encode(network):
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = network.encode(images)
        shapes = [tuple(one.shape[1:]) for one in features]
        assert shapes == [(24, 16, 24), (40, 8, 12), (80, 4, 6), (112, 4, 6), (1280, 2, 3)]
        assert torch.equal(network.decode(features), network(images))


def test_folded_batch_norms_give_the_same_logits_in_any_dtype(network):
    """None of a folded network is hidden from .to(), as a tuple of modules would be."""
    images, folded = torch.randn(2, 3, 64, 64), fold_batch_norms(copy.deepcopy(network))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(images.double())
        torch.testing.assert_close(folded(images).double(), expected, rtol=1e-3, atol=1e-4)
        folded.to(torch.float64)
        torch.testing.assert_close(folded(images.double()), expected, rtol=1e-4, atol=1e-5)
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {torch.float64}


def changed_in_training(network):
    """The names of all state that two steps change."""
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        loss = F.cross_entropy(network(torch.randn(2, 3, 64, 64)), torch.randint(20, (2, 64, 64)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


def test_frozen_encoder_never_changes_and_keeps_no_graph(shallow):
    network = shallow.train()
    assert changed_in_training(network) == {name for name in network.state_dict() if name[:7] != "encoder"}
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    assert all(not features.requires_grad for features in network.encode(images))


def test_finetuning_changes_all_of_the_encoder_without_stochastic_depth():
    network = EfficientSegNet(20, "none", finetune_encoder=True)
    assert changed_in_training(network) == set(network.state_dict())
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


@pytest.mark.usefixtures("shallow")
def test_encoder_weights_from_a_file_with_and_without_classifier(tmp_path):
    whole = shallow_efficientnet().state_dict()
    features = {key: value for key, value in whole.items() if key.startswith("features.")}
    for weights in (whole, features):
        torch.save(weights, tmp_path / "encoder.pth")
        own = EfficientSegNet(3, tmp_path / "encoder.pth").state_dict()
        assert torch.equal(own["encoder5.2.0.weight"], features["features.8.0.weight"])
        assert torch.equal(own["encoder1.0.0.weight"], features["features.0.0.weight"])


def test_failed_download_names_file_place_and_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", Mock(side_effect=OSError("no network")))
    with pytest.raises(WeightsError) as error:
        EfficientSegNet(20, "imagenet")
    name = EfficientNet_B0_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    assert str(tmp_path / "hub" / "checkpoints" / name) in str(error.value)
    assert "--encoder_weights FILE" in str(error.value) and "no network" in str(error.value)


def wrapped_in_module(state_dict):
    whole = {f"base_model.{key}": value for key, value in shallow_efficientnet().state_dict().items()}
    return {f"module.{key}": value for key, value in (state_dict | whole).items()}


SPELLINGS = {
    "ours": lambda own: {"model": own, "config": {"image_size": 128}},
    "bare": lambda own: own,
    "data_parallel": wrapped_in_module,
    "wrapped": lambda own: {"state_dict": own, "epoch": 3},
    "compiled": lambda own: {f"_orig_mod.{key}": value for key, value in own.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_checkpoints_of_other_trainings_are_accepted(shallow, tmp_path, spelling):
    own, path, images = shallow.state_dict(), tmp_path / "checkpoint.pth", torch.randn(1, 3, 64, 64)
    torch.save(SPELLINGS[spelling](own), path)
    checkpoint = models.load_checkpoint(path)
    loaded = models.model_from_checkpoint(checkpoint, path).eval()
    assert list(loaded.state_dict()) == list(own)
    assert checkpoint["config"] == ({"image_size": 128} if spelling == "ours" else {})
    with torch.no_grad():
        assert torch.equal(loaded(images), shallow(images))


def test_the_averages_of_a_last_pth_are_what_is_used(shallow, tmp_path):
    own, path = shallow.state_dict(), tmp_path / "last.pth"
    torch.save({"model": own, "average": {"out.bias": torch.arange(20.0)}, "epoch": 1}, path)
    loaded = models.model_from_checkpoint(models.load_checkpoint(path), path).state_dict()
    assert torch.equal(loaded["out.bias"], torch.arange(20.0))
    assert torch.equal(loaded["out.weight"], own["out.weight"])


class Malicious:
    """Opens a file when it is unpickled."""

    def __init__(self, path):
        self.path = path.with_suffix(".pwned")

    def __reduce__(self):
        return open, (str(self.path), "w")


def damaged(network, path, damage):
    torch.save(network.state_dict(), path)
    path.write_bytes(damage(bytearray(path.read_bytes())))


def flip_a_bit(data):
    data[len(data) // 2] ^= 1  # in the middle of a tensor, where torch.load would not notice
    return data


def changed(network, path, changes):
    torch.save(network.state_dict() | changes, path)


NO_CHECKPOINTS = {
    "another network": lambda own, path: torch.save({"out.weight": torch.zeros(20, 24, 1, 1)}, path),
    "another shape": lambda own, path: changed(own, path, {"encoder1.0.0.weight": torch.ones(1)}),
    "no number": lambda own, path: changed(own, path, {"out.bias": torch.full((20,), torch.nan)}),
    "list": lambda own, path: torch.save([1, 2], path),
    "half": lambda own, path: damaged(own, path, lambda data: data[: len(data) // 2]),
    "bit": lambda own, path: damaged(own, path, flip_a_bit),
    "absent": lambda own, path: None,
    "malicious": lambda own, path: changed(own, path, {"x": Malicious(path)}),
    "pickle": lambda own, path: path.write_bytes(pickle.dumps(Malicious(path), protocol=2)),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_in_one_line_and_never_run(shallow, tmp_path, kind):
    path = tmp_path / "checkpoint.pth"
    NO_CHECKPOINTS[kind](shallow, path)
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


@pytest.mark.parametrize("export", [exported, traced])
def test_an_exported_network_gives_the_same_logits(shallow, tmp_path, export):
    network = fold_batch_norms(shallow)
    again = export(network, tmp_path)
    with torch.no_grad():
        images = torch.randn(3 if export is exported else 1, 3, 64, 64)
        torch.testing.assert_close(again(images), network(images), rtol=1e-4, atol=1e-4)


def test_random_encoder_keeps_its_signal():
    torch.manual_seed(0)
    photo_like = F.interpolate(torch.randn(2, 3, 8, 8), size=(128, 128), mode="bilinear")
    for features in EfficientSegNet(20, "none").encode(photo_like):
        assert 0.05 < features.std() < 20
