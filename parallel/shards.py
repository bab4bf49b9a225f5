"""Where this rank's part of a parameter lies in the whole, and the part seen as a DTensor of the whole."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.init import Draw

Box = tuple[slice, ...]  # of a tensor, dimension by dimension


class Shard(NamedTuple):
    """A rank's part of a parameter."""

    local: Tensor  # live: what the optimizer updates
    shape: torch.Size  # of the whole parameter
    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def as_whole(self, local: Tensor) -> DTensor:
        """A tensor in the form of `local` (the part itself, its gradient, its moment) as its part of the whole.

        It shares the memory of `local`, wherever that is. `DTensor.from_local` would bring what is offloaded to the mesh's device.
        """
        stride = torch.empty(self.shape, device="meta").stride()
        spec = DTensorSpec(self.mesh, self.placements, TensorMeta(self.shape, stride, local.dtype))
        return DTensor(local.detach(), spec, requires_grad=False)

    def write(self, expert: int | None, draw: Draw) -> None:
        """Keep this rank's part of a parameter's values, or of one expert's; values for other ranks are not drawn."""
        box = box_of(self.shape, self.mesh, self.placements)
        if self.local.numel() == 0:
            return
        if expert is None:
            self.local.copy_(draw()[box])
        elif box[0].start <= expert < box[0].stop:
            self.local[expert - box[0].start].copy_(draw()[box[1:]])


def box_of(shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement]) -> Box:
    """What of a whole tensor lies on this rank."""
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(slice(offset, offset + size) for size, offset in zip(sizes, offsets))
