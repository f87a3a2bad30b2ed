"""Dense packing of small integers, as it lies on disk. The code stands with the kernels, which read it too."""

from optimum_qvlm.kernels.packing import pack_codes, packed_width, unpack_codes

__all__ = ["pack_codes", "packed_width", "unpack_codes"]
