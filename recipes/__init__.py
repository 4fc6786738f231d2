"""Hydra recipes for `mpo train`, read as ``pkg://mpo.recipes``. YAML only."""

if __name__ != "mpo.recipes":
    raise ImportError("the recipes folder installs as mpo.recipes; import it under that name")
