"""Where this rank's part of a parameter lies in the whole, and the part seen as a DTensor of the whole."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.init import Draw


class Shard(NamedTuple):
    """A rank's part of a parameter."""

    local: Tensor  # live: what the optimizer updates
    shape: torch.Size  # of the whole parameter
    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def as_whole(self, local: Tensor) -> DTensor:
        """A tensor in the form of `local` (the part itself, its gradient, its moment) as its part of the whole; shares memory."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)

    @property
    def box(self) -> tuple[slice, ...]:
        """What of the whole lies here, dimension by dimension."""
        sizes, offsets = compute_local_shape_and_global_offset(self.shape, self.mesh, self.placements)
        return tuple(slice(offset, offset + size) for size, offset in zip(sizes, offsets))

    def write(self, expert: int | None, draw: Draw) -> None:
        """Keep this rank's part of a parameter's values, or of one expert's; values for other ranks are not drawn."""
        box = self.box
        if self.local.numel() == 0:
            return
        if expert is None:
            self.local.copy_(draw()[box])
        elif box[0].start <= expert < box[0].stop:
            self.local[expert - box[0].start].copy_(draw()[box[1:]])
