"What is built and installed: an sdist from which a wheel is built, installed where there is no checkout, with everything that its commands need"
import configparser, os, subprocess, sys, tarfile, zipfile
from pathlib import Path

import pytest, torch

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(p.relative_to(ROOT/'configs').as_posix() for p in ROOT.glob('configs/**/*.*') if p.is_file())

def run(*args, **kw):
    env = {k: v for k,v in os.environ.items() if k != 'PYTHONPATH'}
    res = subprocess.run(list(map(str, args)), capture_output=True, text=True, env=env, **kw)
    assert res.returncode == 0, res.stdout + res.stderr
    return res.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "An sdist of what git would ship, and the wheel that is built from it"
    tree,out = tmp_path_factory.mktemp('tree'),tmp_path_factory.mktemp('dist')
    for f in run('git', 'ls-files', '-co', '--exclude-standard', cwd=ROOT).splitlines():
        if f.startswith('nbs/') or not (ROOT/f).exists(): continue
        (tree/f).parent.mkdir(parents=True, exist_ok=True)
        (tree/f).write_bytes((ROOT/f).read_bytes())
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, tree)
    return next(out.glob('*.tar.gz')), next(out.glob('*.whl'))

@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    "The Python of an environment that holds the sdist, installed; what it needs it finds in ours"
    env = tmp_path_factory.mktemp('env')
    run(sys.executable, '-m', 'venv', '--without-pip', env)
    python = env/('Scripts' if sys.platform == 'win32' else 'bin')/'python'
    site = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    Path(site, 'ours.pth').write_text(str(Path(torch.__file__).parents[1])) # an editable distillbook does not come along: .pth files there are not read
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-build-isolation', '--no-index', '-q', '--ignore-installed', built[0])
    return python


def test_sdist_holds_what_the_build_reads(built):
    with tarfile.open(built[0]) as t: names = {n.partition('/')[2] for n in t.getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE', 'README.md', 'CHANGELOG.md'} <= names
    assert not [n for n in names if n.startswith(('nbs/', 'tests/', 'benchmarks/'))]

def test_wheel_holds_configs_and_no_other_package(built):
    with zipfile.ZipFile(built[1]) as z: names = z.namelist()
    assert sorted(n.removeprefix('distillbook/configs/') for n in names if n.startswith('distillbook/configs/')) == CONFIGS
    assert {n.partition('/')[0].partition('-')[0] for n in names} == {'distillbook'}

def test_installed_package_runs_without_a_checkout(installed, tmp_path):
    where = run(installed, '-c', 'import distillbook; print(distillbook.__file__)', cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parents[1])
    assert 'train' in run(installed.with_name('distillbook'), '--help', cwd=tmp_path)

def test_installed_configs_are_those_of_the_checkout(installed, tmp_path):
    code = "import importlib.resources, sys; print((importlib.resources.files('distillbook')/'configs'/sys.argv[1]).read_text(), end='')"
    for name in ('quickstart.yml', 'rec/ppocrv3_distillation.yml'): assert run(installed, '-c', code, name, cwd=tmp_path) == (ROOT/'configs'/name).read_text()

def test_ocr_is_an_extra_that_every_installation_brings(built):
    with zipfile.ZipFile(built[1]) as z: meta = z.read(next(n for n in z.namelist() if n.endswith('METADATA'))).decode()
    needs = [l.removeprefix('Requires-Dist: ') for l in meta.splitlines() if l.startswith('Requires-Dist: ')]
    cfg = configparser.ConfigParser()
    cfg.read(ROOT/'settings.ini')
    ocr = cfg['DEFAULT']['ocr_requirements'].split()
    assert 'onnxruntime' in ocr
    assert set(ocr) <= set(needs) and {f'{o}; extra == "ocr"' for o in ocr} <= set(needs)


LIGHT = '''
import sys
from distillbook.learner import distill_learner
from distillbook.losses import kd
print(*sorted({'onnxruntime', 'onnx', 'cv2', 'shapely', 'pyclipper', 'rapidfuzz', 'distillbook.data', 'distillbook.rec', 'distillbook.det'} & set(sys.modules)))'''

def test_front_door_imports_nothing_of_ocr(): assert run(sys.executable, '-c', LIGHT, cwd=ROOT).split() == []
