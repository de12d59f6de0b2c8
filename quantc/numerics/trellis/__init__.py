"""Trellis codes: what a state means, how states are found, and how a closed walk of them is stored."""

from .code import INTEGERS, RMS, places_of, values_of
from .encode import encode
from .stored import pack_states, unpack_states

__all__ = ["INTEGERS", "RMS", "encode", "pack_states", "places_of", "unpack_states", "values_of"]
