"""Conversion of other projects' checkpoints to diffusers folders, without running their code."""

from cm_diffusers.convert.families import FAMILIES, Converted, convert_checkpoint
from cm_diffusers.convert.source import Options


__all__ = ["FAMILIES", "Converted", "Options", "convert_checkpoint"]
