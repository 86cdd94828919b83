"""Checkpoints of other projects as folders of diffusers, without running their code."""

from cm_diffusers.convert.families import FAMILIES, Converted, Options, convert_checkpoint


__all__ = ["FAMILIES", "Converted", "Options", "convert_checkpoint"]
