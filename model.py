"""EfficientSegNet: a frozen EfficientNet-B0 encoder with SegNet-style decoders, and its weights.

The encoder is torchvision's efficientnet_b0 (Tan and Le, 2019, arXiv:1905.11946). Each decoder doubles the
resolution with a transposed convolution and adds the encoder's features of the next finer stage, after SegNet
(Badrinarayanan et al., 2015, arXiv:1511.00561) and U-Net (Ronneberger et al., 2015, arXiv:1505.04597).
"""
import pickle
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn
from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0

from utils import UserError

UPSAMPLER_GAIN = 10  # fresh upsamplers put out a twentieth of what a trained encoder's skip features hold


class WeightsError(UserError):
    """A weights or checkpoint file that cannot be used. The message names the file and the remedy."""


class SegNetDecoder(nn.Module):
    """Double the resolution, add the skip features, and mix both with one 3x3 convolution."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.upsampler = nn.ConvTranspose2d(in_ch, out_ch, kernel_size=2, stride=2)
        with torch.no_grad():
            self.upsampler.weight.mul_(UPSAMPLER_GAIN)
        conv = nn.Conv2d(out_ch, out_ch, kernel_size=3, padding=1)
        self.conv_block = nn.Sequential(conv, nn.BatchNorm2d(out_ch), nn.ReLU(inplace=True))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, in_ch, H, W), and skip (B, out_ch, any, any) or None, to (B, out_ch, 2H, 2W)."""
        if skip is None:
            conv, norm, relu = self.conv_block
            return relu(norm(upsample_and_convolve(x, self.upsampler, conv)))
        x = self.upsampler(x)  # (B, out_ch, 2H, 2W)
        x = x + F.interpolate(skip, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.conv_block(x)


def upsample_and_convolve(x: Tensor, upsampler: nn.ConvTranspose2d, conv: nn.Conv2d) -> Tensor:
    """conv(upsampler(x)), of (B, in_ch, H, W) to (B, out_ch, 2H, 2W), with 2.5 times less arithmetic.

    The two are one linear map, as the upsampler is 2x2 with stride 2 and the convolution 3x3, padded by 1.
    """
    B, _, H, W = x.shape
    with torch.autocast(x.device.type, enabled=False):
        # The upsampler's bias is the weight of one more input channel, of ones: it ends at the border, as the
        # upsampled features do.
        bias = upsampler.bias.view(1, -1, 1, 1).expand(1, -1, 2, 2)
        weight = torch.cat([upsampler.weight, bias])  # (in_ch + 1, mid_ch, 2, 2)
        kernel = F.conv2d(weight, conv.weight, padding=2)  # (in_ch + 1, out_ch, 4, 4)
    x = torch.cat([x, x.new_ones((1, 1, 1, 1)).expand(B, 1, H, W)], dim=1)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


class DepthwiseConv2d(nn.Conv2d):
    """A convolution that a CPU's bf16 autocast leaves in float32.

    oneDNN's backward pass in bf16 is up to 20 times slower, and a fine-tuning step 1.3 times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / stride, W / stride), of the input's dtype."""
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def use_depthwise(network: nn.Module) -> None:
    """Let every depthwise nn.Conv2d of a network be a DepthwiseConv2d, which adds no state, in place."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.groups > 1:
            module.__class__ = DepthwiseConv2d


class EfficientSegNet(nn.Module):
    """Semantic segmentation network: ImageNet-normalised photos in, one logit per class and pixel out.

    The encoder has no stochastic depth. Unless `finetune_encoder` is set it stays in eval mode whatever
    `train()` says: its batch-norm statistics never move, it takes no gradient and keeps no graph.

    Args:
        encoder_weights: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none" (random) or the
            path of a torchvision efficientnet_b0 state_dict; None where a state_dict is loaded next.
        finetune_encoder: train the encoder too, its batch norms as the decoders' are.
    Raises:
        WeightsError: the download failed, or the file is not an efficientnet_b0 state_dict.
    """

    def __init__(self, n_classes: int, encoder_weights: str | Path | None = "imagenet", *,
                 finetune_encoder: bool = False) -> None:
        super().__init__()
        features = load_features(encoder_weights)
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
        for parameter in self.encoder_parameters():
            parameter.requires_grad_(finetune_encoder)
        self.train()

    def encoder_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if name.startswith("encoder")]

    def decoder_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("encoder")]

    def encoder_stages(self) -> list[nn.Module]:
        return [self.encoder1, self.encoder2, self.encoder3, self.encoder4, self.encoder5]

    def train(self, mode: bool = True) -> "EfficientSegNet":
        super().train(mode)
        for stage in self.encoder_stages():
            stage.train(mode and self.finetune_encoder)
        return self

    def encode(self, images: Tensor) -> list[Tensor]:
        """ImageNet-normalised images (B, 3, H, W), H and W multiples of 32, to five maps, finest first.

        They are (B, 24, H/4, W/4), (B, 40, H/8, W/8), (B, 80, H/16, W/16), (B, 112, H/16, W/16) and
        (B, 1280, H/32, W/32), outside autograd unless the encoder is fine-tuned.
        """
        features = [images if self.finetune_encoder else images.detach()]
        for stage in self.encoder_stages():
            features.append(stage(features[-1]))
        return features[1:]

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """The five feature maps of `encode` to logits (B, n_classes, H, W)."""
        x1, x2, x3, x4, x5 = features
        x = self.decoder5(x5, x4)  # (B, 112, H/16, W/16)
        x = self.decoder4(x, x3)  # (B, 80, H/8, W/8)
        x = self.decoder3(x, x2)  # (B, 40, H/4, W/4)
        x = self.decoder2(x, x1)  # (B, 24, H/2, W/2)
        x = self.decoder1(x)  # (B, 24, H, W)
        return self.out(x)

    def forward(self, images: Tensor) -> Tensor:
        """Images as in `encode` to logits (B, n_classes, H, W)."""
        return self.decode(self.encode(images))


def fold_batch_norms(network: EfficientSegNet) -> EfficientSegNet:
    """Fold each batch norm into the convolution before it, in place: the network is for evaluation then."""
    network.eval().requires_grad_(False)
    for block in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for i, (conv, norm) in enumerate(pairwise(block)):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                block[i], block[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return network


# --- Weights and checkpoints --------------------------------------------------------------------------------

def load_features(encoder_weights: str | Path | None) -> nn.Sequential:
    """efficientnet_b0().features of torchvision, with weights and errors as EfficientSegNet says."""
    choice = str(encoder_weights)
    backbone = download_backbone() if choice == "imagenet" else efficientnet_b0(stochastic_depth_prob=0)
    features = backbone.features
    use_depthwise(features)
    if choice == "none":
        # With mean 0 and variance 1, which never move in a frozen encoder, the signal would shrink from layer
        # to layer, to 1e-13 at its end: take the statistics of its own activations on smooth noise.
        noise = F.interpolate(torch.randn(4, 3, 16, 16), size=(128, 128), mode="bilinear")
        update_bn([noise], features)
    elif encoder_weights is not None and choice != "imagenet":
        weights = {key.removeprefix("features."): value
                   for key, value in clean_state_dict(read_tensors(encoder_weights)).items()
                   if key.startswith("features.")}
        load_strictly(features, weights, f"encoder weights {choice}",
                      "a torchvision efficientnet_b0 state_dict")
    return features


def download_backbone() -> nn.Module:
    """torchvision's efficientnet_b0 with its weights IMAGENET1K_V1; WeightsError where they cannot be had."""
    weights = EfficientNet_B0_Weights.IMAGENET1K_V1
    try:
        return efficientnet_b0(weights=weights, stochastic_depth_prob=0)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network, a damaged file
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        raise WeightsError(f"the ImageNet weights could not be loaded ({error}). Put {weights.url} at "
                           f"{cached}, or pass --encoder_weights FILE (an efficientnet_b0 state_dict) or "
                           "--encoder_weights none") from error


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of this project, of another training of this architecture, or a bare state_dict.

    On the CPU; "model" is a state_dict as clean_state_dict leaves it, "config" {} where there is none.
    WeightsError: no such file, damaged, no checkpoint, or more in it than tensors and plain types.
    """
    content = read_tensors(path)
    names = [key for key in ("model", "state_dict", "model_state_dict") if isinstance(content.get(key), dict)]
    checkpoint = content if names else {}
    checkpoint["model"] = clean_state_dict(content[names[0]] if names else dict(content))
    if not isinstance(checkpoint.get("config"), dict):
        checkpoint["config"] = {}
    out = checkpoint["model"].get("out.weight")
    if not isinstance(out, Tensor) or out.ndim != 4 or len(out) < 2:
        raise WeightsError(f"{path} is no checkpoint of EfficientSegNet (it has no out.weight of two or more "
                           "classes); pass a best.pth or last.pth")
    return checkpoint


def model_from_checkpoint(checkpoint: dict, path: str | Path, *,
                          finetune_encoder: bool = False) -> EfficientSegNet:
    """The network of a `load_checkpoint` result, with averaged weights where it has them.

    WeightsError if it is of another architecture.
    """
    tensors, average = checkpoint["model"], checkpoint.get("average")
    if isinstance(average, dict) and average.keys() <= tensors.keys():  # of a last.pth
        tensors = tensors | average
    n_classes = len(tensors["out.weight"])
    network = EfficientSegNet(n_classes, encoder_weights=None, finetune_encoder=finetune_encoder)
    load_strictly(network, tensors, f"checkpoint {path}", "a checkpoint of EfficientSegNet")
    return network


def clean_state_dict(state_dict: dict) -> dict:
    """Undo the prefixes of DataParallel and torch.compile, and drop the classifier's copy of the encoder."""
    renamed = {str(key).replace("_orig_mod.", "").removeprefix("module."): value
               for key, value in state_dict.items()}
    return {key: value for key, value in renamed.items() if not key.startswith("base_model.")}


def read_tensors(path: str | Path) -> dict:
    """torch.load for files of unknown origin: tensors and plain types alone, every failure a WeightsError."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load would not notice a bit that has flipped
                    raise RuntimeError(f"checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch.load raises a dozen types on damaged bytes
        first_line = str(error).split("\n")[0]
        raise WeightsError(f"{path} cannot be loaded with torch {torch.__version__} ({first_line}); "
                           "pass an undamaged file that torch.save made of tensors and plain types, or "
                           "update torch") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}; pass a state_dict or checkpoint")
    return content


def load_strictly(module: nn.Module, state_dict: dict, what: str, expected: str) -> None:
    """load_state_dict that ends in one line: what is missing, unexpected, of another shape or no number."""
    own = module.state_dict()
    shapes = {key: getattr(value, "shape", None) for key, value in state_dict.items()}
    wrong = {"missing": [key for key in own if key not in shapes],
             "unexpected": [key for key in shapes if key not in own],
             "of another shape": [key for key in own if own[key].shape != shapes.get(key, own[key].shape)],
             "with NaN or infinite values": [key for key, value in state_dict.items()
                                             if isinstance(value, Tensor) and not value.isfinite().all()]}
    found = [f"{len(keys)} tensors {how}, first {keys[0]}" for how, keys in wrong.items() if keys]
    if found:
        raise WeightsError(f"{what}: not {expected} ({'; '.join(found)})")
    module.load_state_dict(state_dict)
