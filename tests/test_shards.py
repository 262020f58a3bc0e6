"Epochs shared out among loaders, pictures kept as pixels, and lines that lie in tar files"
import builtins, copy, itertools, json, logging, os, pickle, tarfile
from pathlib import Path
from unittest import mock
import cv2, numpy as np, pytest, torch
from distillbook.data import shards
from distillbook.config import build_model, load_config
from distillbook.core import UserError
from distillbook.config.data import build_dl, make_operations
from distillbook.det.render import render_page
from distillbook.rec.render import render_words
from distillbook.data.lists import label_files
from distillbook.data.loader import SampleDL, batch_order
from distillbook.data.sets import SampleSet
from distillbook.data.shards import ShardDL, read_through, sample_offsets, shard_lines, shard_paths, stream_order, stream_spans, write_shards
from distillbook.data.render import font_files, make_words

CONFIGS = Path(__file__).parents[1]/'configs'
KEYS = ['image','label','length']

def rec_ops(aug=True):
    more = [{'RecConAug': {'prob': .5, 'image_shape': [48,320,3]}}, {'RecAug': None}] if aug else []
    return make_operations([{'DecodeImage': {'img_mode': 'BGR'}}, *more, {'CTCLabelEncode': None}, {'RecResizeImg': {'image_shape': [3,48,320]}}, {'KeepKeys': {'keep_keys': KEYS}}], dict(max_text_length=25))[0]

@pytest.fixture(scope='module')
def words(tmp_path_factory):
    "101 rendered words, of which 2 have no picture"
    d = tmp_path_factory.mktemp('words')
    lines = render_words(make_words(101, 1), font_files('dejavu'), 0)
    for i,(im,w) in enumerate(zip(lines.images, lines.widths)): cv2.imwrite(str(d/(f'{i:03d}.' + ('jpg' if i%3 else 'png'))), im[:,:w])
    (d/'017.jpg').write_bytes(b'not a picture')
    (d/'020.jpg').write_bytes(b'')
    (d/'train.txt').write_text(''.join(f"{i:03d}.{'jpg' if i%3 else 'png'}\t{t}\n" for i,t in enumerate(lines.words)))
    return d

@pytest.fixture(scope='module')
def tars(words, tmp_path_factory):
    d = tmp_path_factory.mktemp('tars')
    write_shards(label_files(words/'train.txt', words), d, per=15)
    return d

def same(a, b): return len(a)==len(b) and all(torch.equal(x, y) for p,q in zip(a, b) for x,y in zip(p, q))

class Bare:
    "A sample without a picture, its number in the place of it"
    def __call__(self, sample, rng): return {**sample, 'image': np.zeros((3,1,1), np.float32), 'number': np.int64(Path(sample['path']).stem)}

def bare(source, train=True, seed=3): return SampleSet(source, [Bare()], ['image','number'], seed=seed, train=train)
def numbers(dl): return [b[1].tolist() for b in dl]


# Parts of an epoch

@pytest.mark.parametrize('n,bs,world,drop_last,buckets', [(101,4,2,False,False), (101,4,3,True,False), (96,4,3,False,False), (101,2,4,False,True), (5,4,4,False,False), (3,2,4,False,False), (97,4,3,True,True)])
def test_parts_make_the_whole(words, n, bs, world, drop_last, buckets):
    source = label_files(words/'train.txt', words)
    source.rows = source.rows[:n]
    data = SampleSet(source, rec_ops(), KEYS, seed=2, ext_op_transform_idx=1)
    if drop_last and n<bs*world: pytest.skip()
    for shuffle in (True, False):
        whole = list(batch_order(data, bs*world, shuffle, drop_last, buckets))
        parts = [list(batch_order(data, bs, shuffle, drop_last, buckets, part=(r,world))) for r in range(world)]
        assert len({*map(len, parts)})==1 and len(parts[0])==len(whole)==len(SampleDL(data, bs=bs, drop_last=drop_last, part=(0,world)))
        for k,b in enumerate(whole):
            own = [p[k] for p in parts]
            assert len({*map(len, own)})==1
            got = np.concatenate(own)
            if buckets: continue
            assert np.array_equal(got[:len(b)], b) and len(got)-len(b)<world
            assert np.array_equal(got[len(b):], np.resize(np.concatenate(whole), n+world)[n:n+len(got)-len(b)]) or drop_last
        seen = sorted(i for p in parts for b in p for i in b)
        assert set(seen)==set(range(n)) or drop_last and len(set(seen))==n//(bs*world)*bs*world
        for skip in range(len(whole)+1):
            rest = list(batch_order(data, bs, shuffle, drop_last, buckets, skip, (world-1,world)))
            assert [o.tolist() for o in rest]==[o.tolist() for o in parts[-1][skip:]]

@pytest.mark.parametrize('n,bs,world', [(101,4,2), (97,4,3), (3,2,4), (8,4,2)])
def test_in_evaluation_no_line_twice(words, n, bs, world):
    data = bare([dict(image=b'', label='', path=f'{i}.png') for i in range(n)], train=False)
    dls = [SampleDL(data, bs=bs, part=(r,world)) if r*1<n else None for r in range(world)]
    got = [numbers(o) for o in dls if o]
    assert sorted(sum(sum(got, []), []))==[*range(n)]
    assert [len(o) for o in got]==[len(o) for o in dls if o]

def test_parts_of_augmented_batches_are_those_of_one_loader(words):
    make = lambda part, bs, workers=0: SampleDL(SampleSet(label_files(words/'train.txt', words), rec_ops(), KEYS, seed=2, ext_op_transform_idx=1), bs=bs, shuffle=True, drop_last=True, num_workers=workers, part=part)
    one,two = make((0,1), 8),[make((r,2), 4, r) for r in range(2)]
    whole,parts = list(one),[list(o) for o in two]
    assert same(whole, [[torch.cat(o) for o in zip(a, b)] for a,b in zip(*parts)])
    again = two[0].new()
    assert again.part==(0,2)
    again.set_epoch(0, skip=5)
    assert same(parts[0][5:], list(again))
    assert two[0].dataset.epoch==1

def test_a_part_that_there_is_not(words):
    data = bare(label_files(words/'train.txt', words))
    for part in ((2,2), (-1,2), (0,0)):
        with pytest.raises(UserError, match='counted from 0'): SampleDL(data, bs=4, part=part)
    with pytest.raises(UserError, match='in each of 3 parts'): SampleDL(data, bs=40, drop_last=True, part=(0,3))


# Pictures kept

def logged(dl, epochs=1):
    "Batches and faults"
    return [b for _ in range(epochs) for b in dl],dl.faults

@pytest.mark.parametrize('aug', [True, False])
def test_kept_lines_are_the_same(words, tmp_path, aug):
    source,make = label_files(words/'train.txt', words),lambda workers=0, **kw: SampleDL(SampleSet(copy.copy(source), rec_ops(aug), KEYS, seed=2, ext_op_transform_idx=1, **kw), bs=16, shuffle=True, num_workers=workers)
    a,faults = logged(make(), 2)
    for workers in (0, 2):
        b,others = logged(make(workers, keep=tmp_path/'kept'), 2)
        assert same(a, b) and faults==others and any('017.jpg' in o and 'not a picture' in o for o in faults)
    assert len(list((tmp_path/'kept').glob('*.bin')))==1 and not list((tmp_path/'kept').glob('.*'))

def test_kept_file_is_read_and_not_the_pictures(words, tmp_path):
    source = label_files(words/'train.txt', words)
    kept = SampleSet(source, rec_ops(), KEYS, seed=2, ext_op_transform_idx=1, keep=tmp_path)
    assert len(kept.kept)==99
    with mock.patch('distillbook.data.operations.picture_from', side_effect=AssertionError): kept[3]
    other = pickle.loads(pickle.dumps(kept.kept))
    assert np.array_equal(other.read(3)['image'], cv2.imread(str(words/'003.png')))
    with pytest.raises(ValueError): other.read(3)['image'][:] = 0

def test_kept_file_is_made_anew_when_a_picture_or_setting_changes(words, tmp_path):
    from shutil import copytree
    d = tmp_path/'words'
    copytree(words, d)
    path = lambda mode='BGR': SampleSet(label_files(d/'train.txt', d), make_operations([{'DecodeImage': {'img_mode': mode}}, {'CTCLabelEncode': None}, {'RecResizeImg': {'image_shape': [3,48,320]}}, {'KeepKeys': {'keep_keys': KEYS}}], dict(max_text_length=25))[0], KEYS, keep=tmp_path/'kept').kept.path
    first = path()
    assert path()==first and path('RGB')!=first
    before = first.stat().st_mtime_ns
    os.utime(d/'030.png', ns=(0, 7))
    assert path()!=first and first.stat().st_mtime_ns==before

def test_kept_pages_are_resized(tmp_path):
    rows = []
    for i in range(4):
        im,polys,texts = render_page(np.random.default_rng(i), 200+i, 300, make_words(50, 0), font_files('dejavu'), words_max=5)
        cv2.imwrite(str(tmp_path/f'{i}.jpg'), im)
        rows.append(f'{i}.jpg\t' + json.dumps([dict(points=np.asarray(p).tolist(), transcription=t) for p,t in zip(polys, texts)]))
    rows.append('0.jpg\tno JSON')
    (tmp_path/'val.txt').write_text('\n'.join(rows))
    ops,keys = make_operations([{'DecodeImage': {'img_mode': 'BGR'}}, {'DetLabelEncode': None}, {'DetResizeForTest': {'limit_side_len': 96}}, {'NormalizeImage': {'order': 'hwc'}}, {'ToCHWImage': None}, {'KeepKeys': {'keep_keys': ['image','shape','polys','ignore_tags']}}])
    plain,kept = (SampleSet(label_files(tmp_path/'val.txt', tmp_path), ops, keys, train=False, **kw) for kw in ({}, dict(keep=tmp_path/'kept')))
    assert [type(o).__name__ for o in kept.kept.ops]==['DecodeImage','DetResizeForTest']
    for i in range(4):
        for a,b in zip(plain[i], kept[i]): assert a.dtype==b.dtype and np.array_equal(a, b)
    for o in (plain, kept):
        with pytest.raises(UserError, match='val.txt:5: .*the label is not JSON'): o[4]

def test_kept_needs_room_and_a_fixed_picture(words, tmp_path):
    source = label_files(words/'train.txt', words)
    make = lambda ops=rec_ops(), **kw: SampleSet(source, ops, KEYS, keep=tmp_path/'kept', **kw)
    with pytest.raises(UserError, match=r'take about .* GB, more than keep_gb: 0.0001'): make(keep_gb=1e-4)
    with mock.patch('shutil.disk_usage', return_value=mock.Mock(free=1000)), pytest.raises(UserError, match='has room for 9e-07 GB'): make()
    for bad in (0, -1, 'much', True, float('nan')):
        with pytest.raises(UserError, match='keep_gb: a number above 0'): make(keep_gb=bad)
    class Mine:
        def __call__(self, sample, rng): return sample
    with pytest.raises(UserError, match='keep: there is no operation'): make([Mine(), *rec_ops()])
    with pytest.raises(UserError, match='only the lines of label files and LMDB'): SampleSet([source[0]], rec_ops(), KEYS, keep=tmp_path/'kept')
    assert not list((tmp_path/'kept').iterdir())

def test_lines_with_several_pictures_are_not_kept(words, tmp_path):
    (tmp_path/'some.txt').write_text('000.png\ta\n'*9 + '["000.png", "003.png"]\ta\n')
    with pytest.raises(UserError, match='several pictures'): SampleSet(label_files(tmp_path/'some.txt', words), rec_ops(), KEYS, ext_op_transform_idx=1, keep=tmp_path/'kept')
    assert not list((tmp_path/'kept').iterdir())

def test_kept_with_a_share_of_the_lines(words, tmp_path):
    make = lambda **kw: SampleSet(label_files(words/'train.txt', words, ratio_list=.3, seed=5), rec_ops(False), KEYS, seed=2, **kw)
    a,b = make(),make(keep=tmp_path)
    for epoch in range(3):
        for o in (a, b): o.set_epoch(epoch)
        assert all(np.array_equal(x, y) for i in range(len(a)) for x,y in zip(a[i], b[i]))


# Shards

def test_shards_hold_what_the_files_hold(words, tars):
    files,source = label_files(words/'train.txt', words),shard_lines(tars)
    assert source.counts.tolist()==[15]*6+[11]
    for i in range(101): assert all(source[i][k]==files[i][k] for k in ('image','label','path'))
    for path in source.paths: assert [k for k,_ in read_through(path)]==[k for k,_ in sample_offsets(path)]

def test_lines_that_are_missing_are_left_out(words, tmp_path, caplog):
    (tmp_path/'some.txt').write_text('000.png\ta\nnowhere.png\tb\n003.png\tc')
    with caplog.at_level(logging.WARNING): write_shards(label_files(tmp_path/'some.txt', words), tmp_path/'out', per=2)
    assert 'nowhere.png: No such file' in caplog.text
    assert shard_lines(tmp_path/'out').counts.tolist()==[1,1]
    with pytest.raises(UserError, match='has shards already'): write_shards(label_files(words/'train.txt', words), tmp_path/'out')
    with pytest.raises(UserError, match='per: how many'): write_shards([], tmp_path/'new', per=0)

def test_names_of_shards(tars, tmp_path):
    whole = shard_paths(tars)
    assert len(whole)==7 and shard_paths(f'{tars}/*.tar')==shard_paths(f'{tars}/{{000000..000006}}.tar')==shard_paths([f'{tars}/{k:06d}.tar' for k in range(7)])==whole
    for name,says in ((f'{tars}/{{000005..000008}}.tar', '000007.tar: no such shard'), (f'{tars}/x*.tar', 'no such shard'), (tmp_path, 'no tar files in this folder')):
        with pytest.raises(UserError, match=says): shard_lines(name)

@pytest.mark.parametrize('n,bs,world,streams,drop_last', itertools.product((1, 7, 101), (1, 4), (1, 3), (1, 2, 5), (False, True)))
def test_streams_share_out_the_row(n, bs, world, streams, drop_last):
    for train in (True, False):
        spans = [stream_spans(n, bs, (r,world), streams, train, drop_last) for r in range(world)]
        got = [list(range(a, b)) for o in spans for a,b in o]
        used = n//(bs*world)*bs*world if drop_last else n
        assert sorted(sum(got, []))==list(range(used if not train else -(-used//world)*world))
        steps = [[-(-(b-a)//bs) for a,b in o] for o in spans]
        if train: assert len({sum(o) for o in steps})==1
        assert all(max(o)-min(o)<=1 and o==sorted(o, reverse=True) for o in steps)

@pytest.mark.parametrize('buffer', [0, 1, 10, 1000])
def test_lines_are_held_back_no_longer_than_told(buffer):
    order = stream_order(50, 350, buffer, np.random.default_rng(0))
    assert sorted(order)==list(range(50, 350))
    assert (np.maximum.accumulate(order)-50-np.arange(300)).max()<=buffer
    assert (order!=np.arange(50, 350)).any()==(buffer>1)

def test_three_ranks_of_two_workers_cover_each_line_once(tars):
    source = shard_lines(tars)
    seen = []
    for epoch in range(2):
        parts = []
        for r in range(3):
            dl = ShardDL(bare(source), bs=4, shuffle=True, num_workers=2, buffer=20, part=(r,3))
            dl.set_epoch(epoch)
            parts.append(numbers(dl))
            assert len(parts[-1])==len(dl)==9
        flat = sum(sum(parts, []), [])
        assert len(flat)==102 and set(flat)==set(range(101))
        assert max(len(set(sum(a, [])) & set(sum(b, []))) for a,b in itertools.combinations(parts, 2))<=1
        seen.append(parts)
    assert seen[0]!=seen[1]
    only = [numbers(ShardDL(bare(source, train=False), bs=4, num_workers=2, part=(r,3))) for r in range(3)]
    assert sum(sum(only, []), [])!=flat and sorted(sum(sum(only, []), []))==list(range(101))

@pytest.mark.parametrize('skip', range(0, 14, 2))
def test_taken_up_where_it_stopped(tars, skip):
    make = lambda workers, streams=None: ShardDL(bare(shard_lines(tars)), bs=4, shuffle=True, num_workers=workers, streams=streams, buffer=15, part=(1,2))
    whole = numbers(make(3))
    for workers in (0, 3):
        dl = make(workers, 3)
        dl.set_epoch(0, skip=skip)
        assert numbers(dl)==whole[skip:] and dl.dataset.epoch==1
    assert len(whole)==13

def test_reading_begins_at_the_first_line_wanted(tars):
    dl = ShardDL(bare(shard_lines(tars)), bs=4, shuffle=False)
    dl.set_epoch(0, skip=20)
    opened = []
    with mock.patch('distillbook.data.shards.read_through', side_effect=lambda p: opened.append(Path(p).name) or read_through(p)): assert numbers(dl)[0]==[80, 81, 82, 83]
    assert opened==['000005.tar','000006.tar']

def test_joined_and_augmented_lines_are_those_of_the_files(words, tars):
    kw = dict(ops=rec_ops(), keep_keys=KEYS, seed=2, ext_op_transform_idx=1)
    a = SampleDL(SampleSet(label_files(words/'train.txt', words), **kw), bs=16)
    b = ShardDL(SampleSet(shard_lines(tars), **kw), bs=16, num_workers=1)
    assert same(list(a), list(b))
    assert len(a.faults)==len(b.faults)==2 and any('000001.tar: 000000017: not a picture' in o for o in b.faults)

def test_other_peoples_shards(tmp_path):
    png = cv2.imencode('.png', np.zeros((4,9,3), np.uint8))[1].tobytes()
    def write(name, *files):
        with tarfile.open(tmp_path/name, 'w') as tar:
            for n,data in files: shards._add(tar, n, data)
    write('a.tar', ('__meta__', b'x'), ('d/1.PNG', png), ('d/1.txt', 'Wörter'.encode()), ('d/1.extra', b''), ('2.txt', b'no picture'), ('3.png', png), ('4.png', png), ('4.json', b'{"label": 7}'), ('5.png', png), ('5.txt', b'end'))
    source = shard_lines(tmp_path/'a.tar')
    assert len(source)==5 and [source[i]['label'] for i in (0, 4)]==['Wörter','end']
    for i,says in ((1, 'no picture'), (2, 'no text'), (3, 'no text')):
        with pytest.raises(UserError, match=says): source[i]
    ops,keys = make_operations([{'DecodeImage': None}, {'CTCLabelEncode': {'max_text_length': 25}}, {'RecResizeImg': {'image_shape': [3,8,32]}}, {'KeepKeys': {'keep_keys': ['image']}}])
    dl = ShardDL(SampleSet(source, ops, keys, train=False), bs=8)
    assert [len(x) for x, in dl]==[2] and len(dl.faults)==3

@pytest.mark.parametrize('workers', [0, 2])
def test_broken_shards_are_named(tars, tmp_path, workers):
    good = (tars/'000002.tar').read_bytes()
    for data in (good[:10_000], b'not a tar'*900, good[:512]):
        (tmp_path/'b.tar').write_bytes(data)
        sample_offsets.cache_clear()
        with pytest.raises(UserError, match='b.tar: not a whole tar file'): shard_lines(tmp_path)
    (tmp_path/'b.tar').write_bytes(good)
    sample_offsets.cache_clear()
    dl = ShardDL(bare(shard_lines(tmp_path)), bs=4, num_workers=workers)
    (tmp_path/'b.tar').write_bytes(good[:10_000])
    with pytest.raises(UserError, match='b.tar: '): list(dl)
    (tmp_path/'b.tar').unlink()
    with pytest.raises(UserError, match='b.tar: .*No such file'): list(dl)

def test_a_list_that_is_wrong_is_not_believed(tars, tmp_path):
    for o in tars.iterdir(): (tmp_path/o.name).write_bytes(o.read_bytes())
    noted = json.loads((tmp_path/'shards.json').read_text())
    noted['000000.tar'] = [99, noted['000000.tar'][1]-1]
    for text in (json.dumps(noted), '{"000000.tar": 3}', '[', '[]'):
        (tmp_path/'shards.json').write_text(text)
        shards._counts_beside.cache_clear()
        assert shard_lines(tmp_path).counts.tolist()==[15]*6+[11]
    noted['000000.tar'] = [99, noted['000000.tar'][1]+1]
    (tmp_path/'shards.json').write_text(json.dumps(noted))
    shards._counts_beside.cache_clear()
    source = shard_lines(tmp_path)
    with pytest.raises(UserError, match='15 samples, but 99 were counted'): source[50]
    with pytest.raises(UserError, match='15 samples, but 99 were counted'): list(ShardDL(bare(source), bs=4))

def test_wrong_loaders(words, tars):
    lines = bare(shard_lines(tars))
    with pytest.raises(UserError, match='buckets'): ShardDL(lines, bs=4, buckets=True)
    with pytest.raises(UserError, match='3 streams cannot be shared equally by 2'): ShardDL(lines, bs=4, num_workers=2, streams=3)
    with pytest.raises(UserError, match='SampleSet of shard_lines'): ShardDL(bare(label_files(words/'train.txt', words)), bs=4)
    with pytest.raises(UserError, match='fewer than one batch'): ShardDL(lines, bs=200, drop_last=True)
    dl = ShardDL(lines, bs=4, num_workers=2, buffer=7, part=(1,2)).new(part=(0,2))
    assert (dl.buffer, dl.streams, dl.part, type(dl))==(7, 2, (0,2), ShardDL)

def test_without_the_package(tars):
    def none(name, *args, real=builtins.__import__, **kw):
        if name.startswith('webdataset'): raise ImportError
        return real(name, *args, **kw)
    with mock.patch('builtins.__import__', none), pytest.raises(UserError, match=r"pip install 'distillbook\[webdataset\]'"): shard_lines(tars)


# In a configuration

def config(words, *more):
    return load_config(CONFIGS/'rec'/'ppocrv3_distillation.yml', [f'Train.dataset.data_dir={words}', f'Train.dataset.label_file_list=[{words}/train.txt]', 'Global.character_dict_path=', 'Train.loader.batch_size_per_card=8', 'Train.loader.num_workers=0', *more])

def test_keep_in_a_configuration(words, tmp_path):
    a,b = build_dl(config(words), 'Train'),build_dl(config(words, f'Train.dataset.keep={tmp_path}'), 'Train')
    assert b.dataset.kept is not None and same(list(a), list(b))
    with pytest.raises(UserError, match='Train.dataset: .*more than keep_gb'): build_dl(config(words, f'Train.dataset.keep={tmp_path}/x', 'Train.dataset.keep_gb=1.0e-6'), 'Train')
    with pytest.raises(UserError, match='Train.dataset.keep: text is wanted, not 3'): build_dl(config(words, 'Train.dataset.keep=3'), 'Train')

def test_shards_in_a_configuration(words, tars):
    files = build_dl(config(words, 'Train.loader.shuffle=false'), 'Train')
    for data_dir,names in ((tars, '[]'), (tars, "['*.tar']"), (tars.parent, f"['{tars.name}/{{000000..000006}}.tar']")):
        dl = build_dl(config(words, 'Train.loader.shuffle=false', 'Train.dataset.name=WebDataset', f'Train.dataset.data_dir={data_dir}', f'Train.dataset.label_file_list={names}', 'Train.dataset.buffer=50'), 'Train')
        assert isinstance(dl, ShardDL) and dl.buffer==50
    assert same(list(files), list(dl))
    with pytest.raises(UserError, match='no such shard'): build_dl(config(words, 'Train.dataset.name=WebDataset', f'Train.dataset.data_dir={tars}', "Train.dataset.label_file_list=['none.tar']"), 'Train')
    with pytest.raises(UserError, match='buffer: a whole number'): build_dl(config(words, 'Train.dataset.name=WebDataset', f'Train.dataset.data_dir={tars}', 'Train.dataset.label_file_list=[]', 'Train.dataset.buffer=-1'), 'Train')

def small(words, *more): return config(words, *[f'Architecture.Models.{n}.{k}' for n in ('Teacher','Student') for k in ('Backbone.scale=0.125', 'Head.head_list.0.CTCHead.Neck={name: svtr, dims: 8, depth: 1, hidden_dims: 16, use_guide: true}', 'Head.head_list.1.SARHead={enc_dim: 16, d_k: 16, max_text_length: 25}')], *more)

def test_frozen_networks_in_bfloat16_and_compiled(words):
    frozen = 'Architecture.Models.Teacher.freeze_params=true'
    model = build_model(small(words, frozen, 'Architecture.Models.Teacher.bf16=true'))
    assert model.bf16=={'Teacher'} and build_model(small(words, frozen)).bf16==set()
    model.eval()
    out = model(torch.rand(1, 3, 48, 64))
    assert out["Teacher"]["head_out"].dtype==torch.float32
    compiled = []
    with mock.patch('torch.nn.Module.compile', lambda self: compiled.append(self)): model = build_model(small(words, frozen, 'Architecture.Models.Teacher.compile=true'))
    assert len(compiled)==1 and compiled[0] is model['Teacher']
    for key in ('bf16','compile'):
        with pytest.raises(UserError, match=f'Architecture.Models.Teacher.{key}: .*freeze_params: true'): build_model(small(words, f'Architecture.Models.Teacher.{key}=true'))
        with pytest.raises(UserError, match=f'Teacher.{key}: .*true or false'): build_model(small(words, frozen, f'Architecture.Models.Teacher.{key}=often'))
