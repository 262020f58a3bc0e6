"tools/every_file.py: what is trained, what is refused, what takes too long, and going on"
import importlib.util, json, math, os
from pathlib import Path
import pytest, yaml
import hostile

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the tool forks')

@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('every_file', ROOT/'tools/every_file.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def a_file(path, **change):
    "Two small networks, and paths that are not here"
    cfg = json.loads(json.dumps(hostile.config(Path('/nowhere'))))
    cfg['Global'].update(epoch_num=100, pretrained_model='./pretrain_models/student', model_name=path.stem, **change.pop('Global', {}))
    cfg['Train']['loader'].update(num_workers=8, batch_size_per_card=128)
    for k,v in change.items(): cfg[k] = v
    path.write_text(yaml.safe_dump(cfg, sort_keys=False))

def told(tool, folder, out, **kw):
    "The rows, and the exit status"
    with pytest.raises(SystemExit) as e: tool.main(str(folder), out=str(out), **kw)
    return json.loads(out.read_text())['files'],e.value.code

def test_rows(tool, tmp_path, capsys, monkeypatch):
    folder,out = tmp_path/'files',tmp_path/'rows.json'
    folder.mkdir()
    a_file(folder/'b_v3.yml')
    a_file(folder/'a_v4.yaml', Global=dict(character_dict_path='ppocr/utils/nobody_has_it.txt'))
    a_file(folder/'c_v2.yml', Optimizer=dict(name='Adma', lr=dict(learning_rate=.001)))
    rows,status = told(tool, folder, out)
    assert list(rows)==['a_v4.yaml','b_v3.yml','c_v2.yml'] and status==1
    good = rows['b_v3.yml']
    assert good['ok'] and good['finite'] and math.isfinite(good['loss']) and good['steps']==2 and good['measured'] and good['also']==[] and good['core_seconds']>0<good['peak_mb']
    assert rows['a_v4.yaml']['also']==['Global.character_dict_path=']
    assert not rows['c_v2.yml']['ok'] and "no optimizer 'Adma'; did you mean 'Adam'" in rows['c_v2.yml']['why'] and not rows['c_v2.yml']['trace']
    assert '2 of 3 trained' in capsys.readouterr().out
    monkeypatch.setattr(tool, 'forked', lambda path, *_: pytest.fail(f'{path} is trained again') if 'c_v2' not in str(path) else (0, '', 0., 0))
    a_file(folder/'c_v2.yml')
    with pytest.raises(FileNotFoundError): tool.main(str(folder), out=str(out)) # Only what did not go well; nothing was written by the one that stands in

def test_too_long(tool, tmp_path, monkeypatch):
    a_file(tmp_path/'x.yml')
    status,*_ = tool.forked(tmp_path/'x.yml', ['Global.epoch_num=0.5'], tmp_path/'run', 60)
    assert status==2
    monkeypatch.setattr(tool, 'app', lambda args: [None for _ in iter(int, 1)])
    assert tool.forked(tmp_path/'x.yml', [], tmp_path/'run', 1)[0]=='too long'

def test_the_same_but_for_names_comes_last(tool, tmp_path):
    for name in ('b_v4','a_v4','c_v3'): a_file(tmp_path/f'{name}.yml')
    a_file(tmp_path/'d_v2.yml', Global=dict(max_text_length=9))
    assert tool.in_order(tmp_path)==(['a_v4.yml','d_v2.yml','b_v4.yml','c_v3.yml'], {'b_v4.yml': 'a_v4.yml', 'c_v3.yml': 'a_v4.yml'})

def test_weights_that_nobody_has(tool, tmp_path):
    a_file(tmp_path/'x.yml')
    cfg = yaml.safe_load((tmp_path/'x.yml').read_text())
    cfg['Architecture']['Models']['Twin'] = dict(pretrained='output/mine', **cfg['Architecture']['Models']['Student'])
    cfg['Architecture']['Models']['Teacher'] = dict(freeze_params=True, **cfg['Architecture']['Models']['Student'])
    cfg['Loss']['loss_config_list'].append(dict(Term=dict(loss='kd', on=['Student.head_out','Teacher.head_out'])))
    (tmp_path/'x.yml').write_text(yaml.safe_dump(cfg, sort_keys=False))
    assert tool.without_weights(tool.read_config(tmp_path/'x.yml', ['Global.pretrained_model=']))==['Architecture.Models.Teacher.pretrained=none', 'Architecture.Models.Twin.pretrained=']

def test_data(tool, tmp_path):
    "Lines of the dictionary, pages, seals: as many polygons as there is writing, of more than four corners"
    for name in ('lines','pages','seals'): (tmp_path/name).mkdir()
    tool.lines(tmp_path/'lines', ['字','a',' ','\u3000','ab'])
    tool.pages(tmp_path/'pages')
    tool.seals(tmp_path/'seals')
    rows = {k: [l.split('\t') for l in (tmp_path/k/'label.txt').read_text(encoding='utf-8').splitlines()] for k in ('lines','pages','seals')}
    assert {k: len(v) for k,v in rows.items()}==dict(lines=4, pages=2, seals=2) and {*''.join(t for _,t in rows['lines'])}=={'字','a'}
    assert all((tmp_path/k/p).exists() for k,v in rows.items() for p,_ in v)
    assert {len(o['points']) for _,t in rows['seals'] for o in json.loads(t)}=={14} and all(json.loads(t) for _,t in rows['pages'])
