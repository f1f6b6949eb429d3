"""The reference of `mstkd bench step`: MST-KDNet as the obvious PyTorch program that one would write from its specification.

Eager, float32, library layers only; attention maps materialised in every layer, one Adam per role, nothing saved or fused.
Parameter names are those of mstkd/models, so that both start from the same weights. Source: MST-KDNet (MICCAI 2025,
arXiv:2507.22626), with the choices that mstkd/methods/mst_kdnet.py takes by default.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = {
    "dice_teacher": 0.4, "dice_student": 0.6, "consistency": 10.0, "kl": 1.0, "content": 0.2, "mst": 0.2, "evd": 1e8 / 120**4, "gsm": 0.1,
    "adversarial": 2e-4,
}  # fmt: skip
RAMP_EPOCHS, TAU, EPSILON = 20, 7.0, 1e-7
STRIDE = 32  # image voxels per token and axis


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        half = [nn.GroupNorm(8, channels), nn.ReLU(), conv(channels, channels)]
        self.body = nn.Sequential(*half, nn.GroupNorm(8, channels), nn.ReLU(), conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Up(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.reduce = nn.Conv3d(2 * channels, channels, 1)
        self.block = ResidualBlock(channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(F.interpolate(self.reduce(x), scale_factor=2, mode="nearest") + skip)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attention = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), -1)
        return self.dropout(self.out((self.dropout(attention) @ v).transpose(1, 2).flatten(2))), attention


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, dropout)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, attention = self.attention(self.attention_norm(x))
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), attention


def upsample(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose3d(inputs, outputs, 2, stride=2)


def conv_bn(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(conv(inputs, outputs, stride), nn.BatchNorm3d(outputs), nn.ReLU())


def up_conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(upsample(inputs, outputs), conv_bn(outputs, outputs))


class Decoder(nn.Module):
    def __init__(self, width: int, dim: int, channels: int):
        super().__init__()
        w2, w4, w8, w16, w32 = (width * k for k in (2, 4, 8, 16, 32))
        self.up12 = upsample(dim, w32)
        self.tap9 = up_conv(dim, w32)
        self.join9 = nn.Sequential(conv_bn(2 * w32, w32), conv_bn(w32, w32), conv_bn(w32, w32), upsample(w32, w16))
        self.tap6 = nn.Sequential(up_conv(dim, w32), up_conv(w32, w16))
        self.join6 = nn.Sequential(conv_bn(2 * w16, w16), conv_bn(w16, w16), upsample(w16, w8))
        self.tap3 = nn.Sequential(up_conv(dim, w32), up_conv(w32, w16), up_conv(w16, w8))
        self.join3 = nn.Sequential(conv_bn(2 * w8, w8, 2), conv_bn(w8, w8, 2), upsample(w8, w4))
        self.tap0 = nn.Sequential(conv_bn(channels, w2), conv_bn(w2, w4))
        self.join0 = nn.Sequential(conv_bn(2 * w4, w4), conv_bn(w4, w4), nn.Conv3d(w4, channels, 1))

    def forward(self, x: Tensor, taps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        z12 = self.up12(taps[3])
        z9 = self.join9(torch.cat([self.tap9(taps[2]), z12], 1))
        z6 = self.join6(torch.cat([self.tap6(taps[1]), z9], 1))
        z3 = self.join3(torch.cat([self.tap3(taps[0]), z6], 1))
        return self.join0(torch.cat([self.tap0(x), z3], 1)), [z3, z6, z9, z12]


class Transformer(nn.Module):
    def __init__(self, channels: int, decoder_width: int, tokens: int, dim: int, layers: int, heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.patch_embedding = nn.Conv3d(channels, dim, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(dim, heads, mlp_dim, dropout) for _ in range(layers))
        self.decoder = Decoder(decoder_width, dim, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        tokens = self.patch_embedding(x)
        hidden = self.dropout(tokens.flatten(2).transpose(1, 2) + self.position)
        states, maps = [], []
        for layer in self.layers:
            hidden, attention = layer(hidden)
            states.append(hidden.transpose(1, 2).unflatten(2, tokens.shape[2:]))
            maps.append(attention)
        tapped = [len(self.layers) * k // 4 - 1 for k in (1, 2, 3, 4)]
        output, decoded = self.decoder(x, [states[k] for k in tapped])
        return output, decoded, [maps[k] for k in tapped]


class Network(nn.Module):
    """Teacher or student; sizes as in the recipe's `method.network`."""

    def __init__(
        self, crop: tuple[int, int, int], width: int, decoder_width: int, embed_dim: int, layers: int, heads: int, mlp_dim: int,
        dropout: float, fuse_dropout: float,
    ):  # fmt: skip
        super().__init__()
        w, w2, w4, w8 = (width * k for k in (1, 2, 4, 8))
        tokens = math.prod(size // STRIDE for size in crop)
        self.stem = nn.Sequential(conv(4, w), ResidualBlock(w))
        self.down1 = nn.Sequential(conv(w, w2, 2), ResidualBlock(w2), ResidualBlock(w2))
        self.down2 = conv(w2, w4, 2)
        self.blocks2 = nn.Sequential(ResidualBlock(w4), ResidualBlock(w4))
        self.down3 = conv(w4, w8, 2)
        self.transformer = Transformer(w8, decoder_width, tokens, embed_dim, layers, heads, mlp_dim, dropout)
        self.bottleneck = nn.Sequential(*(ResidualBlock(w8) for _ in range(4)))
        self.style = nn.Conv3d(w4 + w8 + w8, w8, 1)
        self.fuse = nn.Sequential(nn.Conv3d(w8 + w8, w8, 1), nn.Dropout(fuse_dropout))
        self.up2, self.up1, self.up0 = Up(w4), Up(w2), Up(w)
        self.head = nn.Conv3d(w, 4, 1)

    def forward(self, image: Tensor) -> dict:
        c1 = self.stem(image)
        c2 = self.down1(c1)
        d2 = self.down2(c2)
        c3 = self.blocks2(d2)
        encoded = self.down3(c3)
        output, decoded, attention = self.transformer(encoded)
        transformed = output + encoded
        content = self.bottleneck(transformed)
        style = self.style(torch.cat([F.max_pool3d(d2, 2), encoded, transformed], 1))
        x = self.fuse(torch.cat([style, content], 1))
        x = self.up0(self.up1(self.up2(x, c3), c2), c1)
        return {"logits": self.head(x), "encoded": encoded, "style": style, "content": content, "decoded": decoded, "attention": attention}


class Critic(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        layers, inputs = [], channels
        for outputs in (channels // 2, channels, 2 * channels):
            layers += [nn.Conv3d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            inputs = outputs
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Conv3d(inputs, 1, 1))

    def forward(self, style: Tensor) -> Tensor:
        padding = [n for size in reversed(style.shape[2:]) for n in (max(0, 8 - size) // 2, (max(0, 8 - size) + 1) // 2)]
        return self.layers(F.pad(style, padding)).flatten()


def dice(logits: Tensor, target: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    losses = []
    for c in range(target.shape[1]):
        overlap = (p[:, c] * target[:, c]).sum()
        losses.append(1 - 2 * overlap / ((p[:, c] ** 2).sum() + (target[:, c] ** 2).sum() + EPSILON))
    return sum(losses)


def kl(full: Tensor, missing: Tensor) -> Tensor:
    def standardise(x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (EPSILON + x.std(1, keepdim=True))

    target, source = (F.log_softmax(standardise(x) / TAU, 1) for x in (full, missing))
    return (target.exp() * (target - source)).sum(1).mean() * TAU**2


def extremes(full: list[Tensor], missing: list[Tensor]) -> Tensor:
    tokens = full[0].shape[-1]
    full, missing = (torch.stack(maps) * tokens for maps in (full, missing))
    loss = 0
    for statistic in (lambda maps: maps.max(0).values, lambda maps: maps.min(0).values, lambda maps: maps.mean(0)):
        for f, m in zip(full, missing, strict=True):
            loss = loss + F.mse_loss(m * statistic(missing), f * statistic(full))
    return loss


def style_matching(full: dict, missing: dict) -> Tensor:
    def matrices(features: dict) -> list[Tensor]:
        encoded, style, content = (features[name].flatten(2) for name in ("encoded", "style", "content"))
        return [a @ b.transpose(1, 2) / a.shape[2] for a, b in ((encoded, content), (style, encoded), (content, style))]

    return sum(F.mse_loss(m, f) for f, m in zip(matrices(full), matrices(missing), strict=True)) / 3


def bce(logit: Tensor, truth: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, truth))


class ReferenceStep:
    """Networks, optimisers and one training step; `crop` and `sizes` as for `Network`."""

    def __init__(self, crop: tuple[int, int, int], sizes: dict, device: torch.device):
        self.teacher, self.student = (Network(crop, **sizes).to(device) for _ in range(2))
        self.critic = Critic(8 * sizes["width"]).to(device)
        both = [*self.teacher.parameters(), *self.student.parameters()]
        self.optimizer = torch.optim.Adam(both, lr=1e-4, weight_decay=1e-5)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def __call__(self, image: Tensor, available: Tensor, label: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """One step on image (1, 4, X, Y, Z), available (1, 4) and label (1, X, Y, Z) of BraTS 2018; the terms, unweighted, as 0-d tensors."""
        full, missing = self.teacher(image), self.student(image * available[:, :, None, None, None])
        terms = self.terms(full, missing, label)
        ramp = math.exp(-5 * (1 - min(epoch, RAMP_EPOCHS) / RAMP_EPOCHS) ** 2)
        loss = sum(WEIGHTS[name] * (ramp if name == "consistency" else 1) * term for name, term in terms.items())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        critic_loss = bce(self.critic(full["style"].detach()), 0.0) + bce(self.critic(missing["style"].detach()), 1.0)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        return {name: term.detach() for name, term in {**terms, "critic": critic_loss}.items()}

    def terms(self, full: dict, missing: dict, label: Tensor) -> dict[str, Tensor]:
        whole, core, enhancing = label > 0, (label == 1) | (label == 4), label == 4
        target = torch.stack([whole, core, enhancing, ~whole], 1).float()
        probability_full, probability_missing = torch.sigmoid(full["logits"]), torch.sigmoid(missing["logits"])
        return {
            "dice_teacher": dice(full["logits"], target),
            "dice_student": dice(missing["logits"], target),
            "consistency": sum(F.mse_loss(probability_missing[:, c], probability_full[:, c]) for c in range(4)),
            "kl": kl(full["logits"], missing["logits"]),
            "content": F.mse_loss(missing["content"], full["content"]),
            "mst": sum(F.mse_loss(m, f) for f, m in zip(full["decoded"], missing["decoded"], strict=True)),
            "evd": extremes(full["attention"], missing["attention"]),
            "gsm": style_matching(full, missing),
            "adversarial": bce(self.critic(missing["style"]), 0.0),
        }
