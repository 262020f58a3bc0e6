"The configuration file: what it fills in, and what it says of mistakes."
import copy, pytest, yaml
from distillbook.config.files import checked, defaults, line_of, load_config, save_config
from distillbook.core import UserError


def write(tmp_path, text):
    f = tmp_path/'my.yml'
    f.write_text(text)
    return f


def test_quickstart_is_whole_and_checked():
    cfg = load_config('configs/quickstart.yml')
    assert set(cfg) == set(defaults) and cfg['Global']['save_model_dir'] == 'runs/quickstart'


def test_empty_file_is_all_defaults(tmp_path): assert load_config(write(tmp_path, '')) == defaults


def test_defaults_are_not_shared(tmp_path):
    kept = copy.deepcopy(defaults)
    load_config(write(tmp_path, ''))['Architecture']['Models']['Student']['channels'].append(1)
    assert defaults == kept


def test_saved_config_gives_the_same_run(tmp_path):
    cfg = load_config(write(tmp_path, 'Global: {seed: 3}'), ['Global.alphabet=äöü', 'Train.dataset.words=999'])
    save_config(cfg, tmp_path/'out.yml')
    assert load_config(tmp_path/'out.yml') == cfg


@pytest.mark.parametrize('text,says', [
    ('Global:\n  epochs_num: 3', ":2: Global: no key 'epochs_num'; did you mean 'epoch_num'?"),
    ('\n\nGlobl: {}', ":3: top level: no key 'Globl'; did you mean 'Global'?"),
    ('Train:\n  loader:\n    batch_size: 4', "Train.loader: no key 'batch_size'; did you mean 'batch_size_per_card'?"),
    ('Global:\n  seed: 1.5', ':2: Global.seed: a whole number'),
    ('Global:\n  seed: true', ':2: Global.seed: a whole number'),
    ('Optimizer:\n  lr: fast', ':2: Optimizer.lr: a number'),
    ('Optimizer:\n  lr: -1', 'Optimizer.lr: must be more than 0'),
    ('Global:\n', 'Global: a section is wanted'),
    ('- a\n- b', 'top level: a section is wanted'),
    ('42', 'top level: a section is wanted'),
    ('1: 2', 'no key 1;'),
    ('? [a, b]\n: 1', 'not YAML'),
    ('Global: {seed: 1', 'not YAML'),
    ('Global: !!python/object/apply:os.system [echo]', 'not YAML'),
    ('a: &a [*a]', "no key 'a'"),
    ('Global: {alphabet: aab}', 'each character once'),
    ('Train: {dataset: {words: 8}}', 'a batch of 128 is more than the 8 words'),
])
def test_mistakes(tmp_path, text, says):
    with pytest.raises(UserError) as e: load_config(write(tmp_path, text))
    assert says in str(e.value) and '\n' not in str(e.value) and 'my.yml' in str(e.value)


@pytest.mark.parametrize('o,says', [('Global.sed=1', "did you mean 'seed'"), ('Global', 'looks like'), ('=1', "no key ''"), ('Global.seed=[', 'not YAML'), ('Global.seed=a', 'a whole number'),
                                    ('Global.seed.x=1', "no key 'x'"), ('Global=1', 'a section is wanted')])
def test_overrides(tmp_path, o, says):
    with pytest.raises(UserError) as e: load_config(write(tmp_path, ''), [o])
    assert says in str(e.value) and '\n' not in str(e.value)


def test_numbers_as_yaml_reads_them(tmp_path):
    cfg = load_config(write(tmp_path, 'Optimizer: {lr: 1e-3, weight_decay: 0}'))
    assert cfg['Optimizer'] == dict(lr=1e-3, weight_decay=0.) and isinstance(cfg['Optimizer']['weight_decay'], float)


def test_files(tmp_path):
    with pytest.raises(UserError, match='No such file'): load_config(tmp_path/'none.yml')
    with pytest.raises(UserError, match='cannot be read'): load_config(tmp_path)
    (tmp_path/'b.yml').write_bytes(b'\xff\xfe\x00\x01')
    with pytest.raises(UserError, match='not text|not YAML'): load_config(tmp_path/'b.yml')


def test_line_of(): assert line_of('a: 1\nb:\n  c: 2') == {('a',): 1, ('b',): 2, ('b', 'c'): 3}
