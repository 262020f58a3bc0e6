"The dependencies, read from settings.ini; everything else stands in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser()
cfg.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
settings = cfg['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k,v in settings.items() if k.endswith('_requirements')}
extras['dev'] = sum(extras.values(), [])
setup(install_requires=settings['requirements'].split(), extras_require=extras)
