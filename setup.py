"The dependencies, read from settings.ini, and the packages; everything else stands in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
cfg = ConfigParser()
cfg.read(ROOT/'settings.ini', encoding='utf-8')
settings = cfg['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k,v in settings.items() if k.endswith('_requirements')}
extras['dev'] = sum(extras.values(), [])

# The folder `configs` is installed as `distillbook/configs`, so that `distillbook train -c quickstart` works without a checkout.
configs = {'distillbook.configs': 'configs', 'distillbook.configs.rec': 'configs/rec', 'distillbook.configs.det': 'configs/det'}
setup(install_requires=settings['requirements'].split() + extras['ocr'], extras_require=extras,
    packages=[*find_packages(ROOT, include=['distillbook*']), *configs], package_dir=configs, package_data={o: ['*.yml', '*.txt'] for o in configs})
