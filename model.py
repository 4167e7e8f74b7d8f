"""EfficientSegNet: a frozen EfficientNet-B0 encoder with SegNet-style decoders, and the reading of its weights.

The encoder is torchvision's efficientnet_b0 (Tan and Le, 2019, arXiv:1905.11946). Each decoder doubles the resolution with
a transposed convolution and adds the encoder's features of the next finer stage, after SegNet (Badrinarayanan et al., 2015,
arXiv:1511.00561) and U-Net (Ronneberger et al., 2015, arXiv:1505.04597).
"""
import copy
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0
from torchvision.ops import Conv2dNormActivation

# Skip features of a trained encoder are some twenty times as large as what a fresh upsampler puts out, and would drown it.
UPSAMPLER_GAIN = 10
ENCODERS = ("encoder1", "encoder2", "encoder3", "encoder4", "encoder5")


class WeightsError(Exception):
    """A weights or checkpoint file that cannot be used. The message names the file and the remedy."""


class SegNetDecoder(nn.Module):
    """Double the resolution, add the skip features, and mix both with one 3x3 convolution.

    Args:
        in_ch: channels of the coarse features.
        out_ch: channels of the result, and of the skip features.
    """

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.upsampler = nn.ConvTranspose2d(in_ch, out_ch, kernel_size=2, stride=2)
        with torch.no_grad():
            self.upsampler.weight.mul_(UPSAMPLER_GAIN)
        self.conv_block = nn.Sequential(
            nn.Conv2d(out_ch, out_ch, kernel_size=3, padding=1), nn.BatchNorm2d(out_ch), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, in_ch, H, W), and skip (B, out_ch, any, any) or None, to (B, out_ch, 2H, 2W)."""
        x = self.upsampler(x)  # (B, out_ch, 2H, 2W)
        if skip is not None:
            x = x + F.interpolate(skip, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.conv_block(x)


class DepthwiseConv2d(nn.Conv2d):
    """A convolution that a CPU's bf16 autocast leaves in float32: its backward pass is up to 20 times faster than in bf16.

    (oneDNN, for 5x5 kernels and strides of 2; the forward pass takes the same time in both.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / stride, W / stride), of the input's dtype."""
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


class EfficientSegNet(nn.Module):
    """Semantic segmentation network: ImageNet-normalised photos in, one logit per class and pixel out.

    The encoder stays in eval mode whatever `train()` says: its batch-norm statistics never move and stochastic depth is off.
    Unless `finetune_encoder` is set it also takes no gradient and keeps no autograd graph.

    Args:
        n_classes: channels of the output.
        encoder_weights: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none" (random) or the path of a
            torchvision efficientnet_b0 state_dict, with or without its classifier; None where a state_dict is loaded next.
        finetune_encoder: train the encoder's weights too (its batch-norm statistics stay frozen).
    Raises:
        WeightsError: the download failed, or the file is not an efficientnet_b0 state_dict.
    """

    def __init__(
        self, n_classes: int, encoder_weights: str | Path | None = "imagenet", *, finetune_encoder: bool = False
    ) -> None:
        super().__init__()
        features = load_backbone(encoder_weights).features
        self.encoder1 = nn.Sequential(*features[0:3])  # 1/4 of the input's size,  24 channels
        self.encoder2 = nn.Sequential(*features[3])  # 1/8,   40
        self.encoder3 = nn.Sequential(*features[4])  # 1/16,  80
        self.encoder4 = nn.Sequential(*features[5])  # 1/16, 112
        self.encoder5 = nn.Sequential(*features[6:9])  # 1/32, 1280
        self.decoder5 = SegNetDecoder(1280, 112)
        self.decoder4 = SegNetDecoder(112, 80)
        self.decoder3 = SegNetDecoder(80, 40)
        self.decoder2 = SegNetDecoder(40, 24)
        self.decoder1 = SegNetDecoder(24, 24)
        self.out = nn.Conv2d(24, n_classes, kernel_size=1)

        self.finetune_encoder = finetune_encoder
        self._folded_encoders: tuple[nn.Module, ...] = ()  # in a tuple, so that state_dict() does not see them
        for parameter in self.encoder_parameters():
            parameter.requires_grad_(finetune_encoder)
        for layer in self.modules() if finetune_encoder else ():
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                layer.__class__ = DepthwiseConv2d  # the same layer with another forward
        self.train()

    def encoder_parameters(self) -> list[nn.Parameter]:
        return [parameter for name in ENCODERS for parameter in getattr(self, name).parameters()]

    def decoder_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("encoder")]

    def train(self, mode: bool = True) -> "EfficientSegNet":
        super().train(mode)
        for name in ENCODERS:
            getattr(self, name).eval()
        return self

    def fold_encoder(self) -> "EfficientSegNet":
        """Run a copy of the frozen encoder whose batch norms are folded into its convolutions; the state_dict is unchanged.

        Call it once the weights are loaded and on their device: the copy does not follow later changes. The encoder of a
        model that trains it is left alone.
        """
        if not self.finetune_encoder:
            encoders = tuple(copy.deepcopy(getattr(self, name)) for name in ENCODERS)
            for layer in (layer for encoder in encoders for layer in encoder.modules()):
                if isinstance(layer, Conv2dNormActivation):
                    layer[0], layer[1] = fuse_conv_bn_eval(layer[0], layer[1]), nn.Identity()
            self._folded_encoders = encoders
        return self

    def encode(self, images: Tensor) -> list[Tensor]:
        """Features of the five encoder stages, finest first; outside autograd unless the encoder is fine-tuned."""
        features = []
        with torch.set_grad_enabled(self.finetune_encoder and torch.is_grad_enabled()):
            for encoder in self._folded_encoders or [getattr(self, name) for name in ENCODERS]:
                images = encoder(images)
                features.append(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """ImageNet-normalised float images (B, 3, H, W), H and W multiples of 32, to logits (B, n_classes, H, W)."""
        x1, x2, x3, x4, x5 = self.encode(images)  # (B, 24, H/4, W/4) ... (B, 1280, H/32, W/32)
        x = self.decoder5(x5, x4)  # (B, 112, H/16, W/16)
        x = self.decoder4(x, x3)  # (B, 80, H/8, W/8)
        x = self.decoder3(x, x2)  # (B, 40, H/4, W/4)
        x = self.decoder2(x, x1)  # (B, 24, H/2, W/2)
        x = self.decoder1(x)  # (B, 24, H, W)
        return self.out(x)


def load_backbone(encoder_weights: str | Path | None) -> nn.Module:
    """torchvision's efficientnet_b0 with the weights that EfficientSegNet's `encoder_weights` names.

    Raises:
        WeightsError: see EfficientSegNet.
    """
    if encoder_weights is None:
        return efficientnet_b0()
    if str(encoder_weights) == "none":
        return calibrate_batch_norms(efficientnet_b0())
    if str(encoder_weights) == "imagenet":
        weights = EfficientNet_B0_Weights.IMAGENET1K_V1
        try:
            return efficientnet_b0(weights=weights)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network, bad hash, damaged file
            cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
            raise WeightsError(
                f"the ImageNet weights could not be loaded ({error}). Put {cached.name} from {weights.url} at {cached}, "
                "or pass --encoder_weights FILE (an efficientnet_b0 state_dict) or --encoder_weights none"
            ) from error
    backbone = efficientnet_b0()
    state_dict = clean_state_dict(read_tensors(encoder_weights))
    features = {key: value for key, value in state_dict.items() if key.startswith("features.")}
    load_strictly(backbone.features, {key.removeprefix("features."): value for key, value in features.items()},
                  f"encoder weights {encoder_weights}", "a torchvision efficientnet_b0 state_dict")
    return backbone


@torch.no_grad()
def calibrate_batch_norms(network: nn.Module) -> nn.Module:
    """Set the batch-norm statistics of a random network to those of its own activations on smooth noise.

    They never move in a frozen encoder, and with the initial mean 0 and variance 1 the signal shrinks from layer to layer, to
    1e-13 at the encoder's end.
    """
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0  # take over the statistics of the one batch
    network.train()(F.interpolate(torch.randn(4, 3, 16, 16), size=(128, 128), mode="bilinear"))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1
            layer.num_batches_tracked.zero_()
    return network


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of this project, of another training of this architecture, or a bare state_dict, onto the CPU.

    Returns:
        The checkpoint's dict. "model" is a state_dict without `base_model.*` (a second copy of the encoder) and without
        `module.` and `_orig_mod.` prefixes; "config" is {} where the file carries none.
    Raises:
        WeightsError: no such file, damaged, not a checkpoint, or one that holds more than tensors and plain types.
    """
    content = read_tensors(path)
    wrapped = next((key for key in ("model", "state_dict", "model_state_dict") if isinstance(content.get(key), dict)), None)
    checkpoint = content | {"model": clean_state_dict(content[wrapped])} if wrapped else {"model": clean_state_dict(content)}
    if not isinstance(checkpoint["model"].get("out.weight"), Tensor):
        raise WeightsError(f"{path} is no checkpoint of EfficientSegNet (it has no out.weight); pass a best.pth or last.pth")
    return {"config": {}} | checkpoint


def model_from_checkpoint(checkpoint: dict, path: str | Path, *, finetune_encoder: bool = False) -> EfficientSegNet:
    """The network of a `load_checkpoint` result; the number of classes is read off its output layer.

    Raises:
        WeightsError: the tensors are those of another architecture.
    """
    n_classes = checkpoint["model"]["out.weight"].shape[0]
    model = EfficientSegNet(n_classes, encoder_weights=None, finetune_encoder=finetune_encoder)
    load_strictly(model, checkpoint["model"], f"checkpoint {path}", "a checkpoint of EfficientSegNet")
    return model


def clean_state_dict(state_dict: dict) -> dict:
    """Undo the prefixes of DataParallel and torch.compile, and drop the classifier's second copy of the encoder."""
    names = {key: str(key).replace("_orig_mod.", "").removeprefix("module.") for key in state_dict}
    return {names[key]: value for key, value in state_dict.items() if not names[key].startswith("base_model.")}


def read_tensors(path: str | Path) -> dict:
    """torch.load for files of unknown origin: tensors and plain types only, and every failure a WeightsError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} was refused: it is no torch file, or holds more than tensors and plain types, or comes from a newer "
            f"torch than {torch.__version__}. Pass a file you trust that was saved as a plain state_dict"
        ) from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:  # torch.load raises RuntimeError, EOFError, KeyError, ... on damaged bytes
        reason = str(error).split("\n")[0]
        remedy = "update torch" if "maximum supported version" in reason else "pass an undamaged file saved by torch.save"
        raise WeightsError(f"{path} cannot be loaded with torch {torch.__version__} ({reason}); {remedy}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dict of tensors; pass a state_dict or checkpoint")
    return content


def load_strictly(module: nn.Module, state_dict: dict, what: str, expected: str) -> None:
    """load_state_dict that ends in one line: what is missing, unexpected or of another shape."""
    own = module.state_dict()
    wrong = [
        ("missing", [key for key in own if key not in state_dict]),
        ("unexpected", [key for key in state_dict if key not in own]),
        ("of another shape", [key for key in own if key in state_dict and own[key].shape != getattr(state_dict[key], "shape", None)]),
    ]
    found = [f"{len(keys)} tensors {how}, first {keys[0]}" for how, keys in wrong if keys]
    if found:
        raise WeightsError(f"{what}: not {expected} ({'; '.join(found)})")
    module.load_state_dict(state_dict)
