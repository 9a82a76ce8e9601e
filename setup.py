"""Packaging, read from settings.ini so that a name, a version or a requirement is written once."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def requirements(key: str) -> list[str]:
    "The requirements under `key`, one string each."
    return cfg.get(key, "").split()


weeks = {k.removesuffix("_requirements"): requirements(k) for k in cfg
         if k.startswith("week") and k.endswith("_requirements")}
extras = {**weeks, "all": sorted({r for rs in weeks.values() for r in rs}),
          "documents": requirements("documents_requirements"),
          "dev": requirements("dev_requirements"), "zero": requirements("zero_requirements")}

setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    packages=find_packages(include=["mlcourse", "mlcourse.*"]),
    package_data={"mlcourse": ["data/**/*"]},
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": ["mlcourse=mlcourse.cli:main", "train_qlora=mlcourse.qlora:main"],
        "nbdev": ["mlcourse=mlcourse._modidx:d"]},
)
