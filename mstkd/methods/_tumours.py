"""What methods that segment tumours have in common."""

from torch import Tensor

from mstkd.batch import Batch
from mstkd.errors import UserError
from mstkd.methods import Method
from mstkd.targets import TumourChannels


class TumourSegmentation(Method):
    """A method whose logits have `channels` of a tumour, and whose networks, unless it says otherwise, see the image alone."""

    task = "segmentation"
    channels: TumourChannels

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        return self.networks[network](image).logits

    def to_labels(self, logits: Tensor) -> Tensor:
        return self.channels.decode(logits)

    def probabilities(self, logits: Tensor) -> dict[str, Tensor]:
        return self.channels.probabilities(logits)


def encoded(batch: Batch, channels: TumourChannels) -> Tensor:
    """Targets (B, K, X, Y, Z). Raises UserError if the shard set has no labels."""
    if batch.label is None:
        raise UserError(f"subject {batch.subject[0]}: no label in the shard set; this method trains on labelled subjects only")
    return channels.encode(batch.label)
