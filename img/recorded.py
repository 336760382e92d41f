"""What networks said, written down as JSON with boxes in fractional boundary coordinates, and the figures that are
drawn from it without a network: of one that memorizes the photograph, and of one that was trained on many."""

import json
from collections import Counter

import torch
from torch.nn import functional as F

import utils
from model import FEATURE_MAPS, SSD300, MultiBoxLoss, load_model
from scenes import BOXES, CLASSES, DOG, HERE, LABELS, PRIORS, PRIORS_XY, Scene, read
from svg import AMBER, BLUE, GRAY, GREEN, LINE_HEIGHT, PURPLE, figure, tint
from utils import find_jaccard_overlap, label_map, load_checkpoint, replaced_file, rev_label_map

# The lowest score that is drawn, and which photographs are shown, each with a caption.
GALLERY = 0.6, dict.fromkeys(('person.jpg', 'chelsea.jpg', 'hopper.jpg', 'cameraman.jpg', 'motorcycle.jpg', 'dog.jpg',
                              'astronaut.jpg', 'eagle.jpg'), '')
FAILURES = 0.2, {'horses.jpg': 'horses, mostly taken for cows', 'person.jpg': 'a horse: a sheep, or a cow?',
                 'sheep.jpg': 'small sheep, not the large ewe', 'kite.jpg': 'only one of all these people\nis found',
                 'motorcycle.jpg': 'three names for one motorbike,\ntwo people who aren\'t there',
                 'airplane.jpg': 'an aeroplane from above:\nnothing is found'}
HERO = 'memorized'  # whose detections the hero shows: 'memorized', or 'trained' for those of --record

MIN_SCORE, MAX_OVERLAP, TOP_K = 0.2, 0.5, 200  # as in detect.py
SHOWN_STEPS = 1, 20, 40, 60
RECORDED_STEPS = 1, 20, 35, 40, 60  # at step 35 the objects have a ranking from which average precision can be learned
FULL_STEPS = 40, 60  # of these, candidates, scores and hard negatives are written down as well


def write(name, content):
    with replaced_file(HERE / f'recorded/{name}.json') as file:
        file.write((json.dumps(content, separators=(',', ':')).replace('},', '},\n') + '\n').encode())
    print(f'recorded/{name}.json')


def image_of(path, model):
    return utils.render_window(utils.read_image(path), mean=model.image_mean, std=model.image_std)  # (3, 300, 300)


def rounded(boxes, labels, scores, names):
    """Return [{'label', 'score', 'box'}] of boxes (n, 4), labels (n), scores (n)."""
    return [{'label': names[label], 'score': round(score, 3), 'box': [round(value, 4) for value in box]}
            for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist())]


def what_it_says(model, predicted_locs, predicted_scores, names, full=True):
    """Return a network's objects in one picture, and if wanted its candidates before non-maximum suppression."""
    found = model.detect_objects(predicted_locs, predicted_scores, MIN_SCORE, MAX_OVERLAP, TOP_K)
    (boxes,), (probabilities,) = model.decode(predicted_locs, predicted_scores)
    priors, labels = (probabilities[:, 1:] > MIN_SCORE).nonzero(as_tuple=True)  # (n_candidates)
    scores = probabilities[priors, labels + 1]
    record = {'n_candidates': len(scores), 'objects': rounded(*(values[0] for values in found), names)}
    if full:
        best = scores.argsort(descending=True, stable=True)
        record['candidates'] = rounded(boxes[priors[best]], labels[best] + 1, scores[best], names)
    return record


@torch.no_grad()
def record_photos(checkpoint):
    """What a trained network finds in all photographs; in the running example also its candidates."""
    model, own_label_map = load_model(checkpoint)
    names = {number: label for label, number in own_label_map.items()}
    record = {}
    for path in sorted((HERE / 'photos').glob('*.jpg')):
        output = model(image_of(path, model)[None])
        record[path.name] = what_it_says(model, *output, names, full=path == DOG)
    write('photos', record)


@torch.no_grad()
def record_quick_start(checkpoints):
    """What checkpoints of the quick start find in one training picture, without duplicates."""
    record = read('quick_start') | {'epochs': {}}
    for checkpoint in checkpoints:
        model, own_label_map = load_model(checkpoint)
        names = {number: label for label, number in own_label_map.items()}
        output = model(image_of(HERE / record['picture'], model)[None])
        found = model.detect_objects(*output, MIN_SCORE, max_overlap=0.2, top_k=4)
        record['epochs'][str(load_checkpoint(checkpoint)['epoch'])] = rounded(*(values[0] for values in found), names)
    write('quick_start', record)


def record_teach():
    """Teach an untrained network the one photograph, as the README does, and write down what it says at some steps:
    the output from which that step's loss is computed."""
    torch.set_num_threads(1)  # several add up in another order each time, and sixty steps make that visible
    criterion = MultiBoxLoss(PRIORS)
    torch.manual_seed(0)
    student = SSD300(n_classes=len(label_map))
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    image, record = image_of(DOG, student), {'steps': {}}
    for step in range(1, max(RECORDED_STEPS) + 1):
        predicted_locs, predicted_scores = student(image[None])  # (1, 8732, 4), (1, 8732, 21)
        loss = criterion(predicted_locs, predicted_scores, [BOXES], [LABELS])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 10)
        optimizer.step()
        print(step, round(loss.item(), 2))
        if step in RECORDED_STEPS:
            output = predicted_locs.detach(), predicted_scores.detach()
            said = {'loss': round(loss.item(), 2)}
            said |= what_it_says(student, *output, rev_label_map, full=step in FULL_STEPS)
            if step in FULL_STEPS:
                said |= inner_life(output[1][0], CLASSES, criterion.neg_pos_ratio)
            record['steps'][str(step)] = said
    write('teach', record)


def inner_life(scores, classes, ratio):
    """Return what can be seen inside one image's scores (8732, 21), given its priors' true classes (8732): the best
    score at each position of the six maps, and the hard negatives."""
    probabilities = scores.softmax(dim=1)
    best, believed = probabilities[:, 1:].max(dim=1)  # (8732): of all classes but the background
    counts = [feature_map.grid ** 2 * feature_map.n_priors for feature_map in FEATURE_MAPS]
    maps = []
    for feature_map, values, names in zip(FEATURE_MAPS, best.split(counts), believed.split(counts)):
        percent = (100 * values).round().int().view(feature_map.grid, feature_map.grid, -1).amax(dim=2).tolist()
        maps.append({'best': rev_label_map[int(names[values.argmax()]) + 1], 'percent': percent})
    losses = F.cross_entropy(scores, classes, reduction='none').masked_fill(classes > 0, 0)  # (8732)
    hard = losses.argsort(descending=True, stable=True)[:ratio * int((classes > 0).sum())].tolist()
    motorbike = (classes == label_map['motorbike']).nonzero().item()  # its only positive prior
    return {'maps': maps, 'motorbike': round(probabilities[motorbike, label_map['motorbike']].item(), 2),
            'hard': [{'prior': i, 'loss': round(losses[i].item(), 2), 'label': rev_label_map[int(believed[i]) + 1]}
                     for i in hard]}


def clipped(box):
    """A box may reach beyond the picture; what can be drawn ends there."""
    return [min(max(value, 0), 1) for value in box]


def draw_found(scene, found, thin=False, text='{label} {score:.2f}'):
    """The boxes of detections, the best on top; and if they aren't thin, labels at those that are large enough."""
    for one in reversed(found):
        scene.box(clipped(one['box']), BLUE, thin=thin)
    for one in () if thin else found:
        left, top, right, bottom = clipped(one['box'])
        if min(right - left, (bottom - top) * scene.height / scene.width) > 0.04:
            scene.label((left, top, right, bottom), AMBER, text.format(**one))


@figure(width=652, height=228, shown_width=1000)
def hero(canvas):
    """The photograph, the priors that match, the candidates, and the objects found."""
    said = read('teach')['steps']['60'] if HERO == 'memorized' else read('photos')['dog.jpg']
    positive, x = PRIORS_XY[CLASSES > 0].clamp(0, 1), 10
    texts = ('one\npicture', f'{len(positive)} priors\nmatch', f'{len(said["candidates"])}\ncandidates',
             f'{len(said["objects"])} objects')
    for i, (text, width, y) in enumerate(zip(texts, (114, 114, 114, 252), (34, 34, 34, 7))):
        scene = Scene(canvas, DOG, x, y, width, faded=i in (1, 2))
        if i == 1:
            scene.boxes(positive, GREEN, thin=True)
        elif i > 1:
            draw_found(scene, said['candidates' if i == 2 else 'objects'], thin=i == 2, text='{label}')
        canvas.center(x + width / 2, y + scene.height + 23, text, title=True)
        x += width + 13
        if i < 3:
            canvas.arrow(x - 12, 77, x - 1, 77)


@figure()
def quick_start_training(canvas):
    """The three most confident boxes in one training picture as the quick start goes on."""
    record = read('quick_start')
    path, epochs = HERE / record['picture'], sorted(record['epochs'], key=int)
    canvas.height = 36 + -(-len(epochs) // 3) * 260
    canvas.center(300, canvas.height - 14, 'the three most confident boxes after each of these epochs', bold=False)
    for i, epoch in enumerate(epochs):
        x, y = 16 + i % 3 * 192, 12 + i // 3 * 258
        found = [{'number': j, **one} for j, one in enumerate(record['epochs'][epoch][:3], start=1)]
        canvas.center(x + 92, y + 18, f'epoch {epoch}')
        scene = Scene(canvas, path, x, y + 28, 184)
        draw_found(scene, found, text='{number}')
        lines = ('{number} {label} {score:.2f}'.format(**one) for one in found)
        canvas.text(x, y + scene.height + 50, '\n'.join(lines))


def draw_photos(canvas, min_score, captions, text):
    """Photographs with what the network finds in them, two side by side, and captions below them."""
    record, heights = read('photos'), [16, 16]
    for name, caption in captions.items():
        column = heights.index(min(heights))
        x, y = 16 + column * 288, heights[column]
        scene = Scene(canvas, HERE / 'photos' / name, x, y, 280)
        draw_found(scene, [one for one in record[name]['objects'] if one['score'] >= min_score], text=text)
        if caption:
            canvas.text(x, y + scene.height + 24, caption)
        heights[column] += scene.height + (LINE_HEIGHT * len(caption.splitlines()) + 20 if caption else 10)
    canvas.height = max(heights) + 6


@figure()
def gallery(canvas):
    draw_photos(canvas, *GALLERY, '{label} {score:.2f}')


@figure()
def failures(canvas):
    draw_photos(canvas, *FAILURES, '{label}')


@figure(height=580)
def teach(canvas):
    """What the network that learns one photograph sees in it, at four steps."""
    for i, step in enumerate(SHOWN_STEPS):
        said = read('teach')['steps'][str(step)]
        x, y, found = 16 + i % 2 * 288, 16 + i // 2 * 283, said['objects']
        scene = Scene(canvas, DOG, x, y, 280)
        draw_found(scene, found, thin=True)
        if len(found) < TOP_K:
            draw_found(scene, found[:4])
        canvas.text(x, y + scene.height + 26, f'step {step}: loss {said["loss"]:.1f}, {len(found)} boxes', bold=True)
        counts = Counter(one['label'] for one in found).most_common()
        lines = [f'{count} {label}' for label, count in counts if count >= len(found) / 10]
        canvas.text(x, y + scene.height + 51, ', '.join(lines + ['…'] * (len(lines) < len(counts))))


@figure(height=560)
def score_maps(canvas):
    """The best score at each position of each feature map, over the picture squeezed as the network sees it."""
    for i, (feature_map, scores) in enumerate(zip(FEATURE_MAPS, read('teach')['steps']['60']['maps'])):
        x, y, side = 16 + i % 3 * 192, 16 + i // 3 * 258, 184
        Scene(canvas, DOG, x, y, side, side, faded=True)
        cell, best_scores = side / feature_map.grid, torch.tensor(scores['percent']) / 100
        for row, column in (best_scores > 0.045).nonzero().tolist():
            canvas.rect(x + column * cell, y + row * cell, cell, cell, AMBER, opacity=f'{best_scores[row, column]:.2f}')
        highest = best_scores.max().item()
        best = scores['best'] if highest > MIN_SCORE else 'at most'
        canvas.center(x + side / 2, y + side + 24, feature_map.name)
        canvas.center(x + side / 2, y + side + 49, f'{best} {highest:.2f}', bold=False)
    canvas.center(300, 544, 'the best score at each position, and the highest of each map', bold=False)


@figure(height=470)
def hard_negatives(canvas):
    """The negative priors with the highest losses at step 40, and the classes that the network saw in them."""
    hard = read('teach')['steps']['40']['hard']
    scene = Scene(canvas, DOG, 16, 16, 380, 380, faded=True)
    for one in hard:
        scene.box(clipped(PRIORS_XY[one['prior']].tolist()), GRAY, thin=True)
    worst = {}  # of each class
    for one in hard:
        if PRIORS[one['prior'], 2:].prod() < 0.25 and len(worst) < 4:
            worst.setdefault(one['label'], clipped(PRIORS_XY[one['prior']].tolist()))
    for box in worst.values():
        scene.box(box, GRAY)
    for label, box in worst.items():
        scene.label(box, AMBER, label)
    canvas.text(412, 36, f'{len(hard)} hard negatives,\nseen as:', bold=True)
    ranked = Counter(one['label'] for one in hard).most_common()
    lines = [*ranked[:7], ('others', sum(count for _, count in ranked[7:]))]
    for i, (label, count) in enumerate(lines):
        canvas.rect(412, 76 + i * 36, 172 * count / lines[0][1], 28, tint(AMBER, 0.6))
        canvas.text(418, 96 + i * 36, f'{count} {label}')
    canvas.text(16, 424, f'at step 40, with losses from {hard[0]["loss"]:.1f} down to {hard[-1]["loss"]:.1f};\n'
                'framed: the worst small one of each of four classes')


def candidates():
    """Return {label: (scores, boxes, overlaps with the best)} of the candidates at step 60, highest score first."""
    classes, found = {}, read('teach')['steps']['60']['candidates']
    for label in dict.fromkeys(one['label'] for one in found):
        scores, boxes = zip(*((one['score'], one['box']) for one in found if one['label'] == label))
        boxes = torch.tensor(boxes)
        classes[label] = scores, boxes, find_jaccard_overlap(boxes[:1], boxes)[0].tolist()
    return classes


@figure(height=486)
def nms_candidates(canvas):
    """All candidates at step 60."""
    classes, found = candidates(), read('teach')['steps']['60']['candidates']
    scene = Scene(canvas, DOG, 16, 16, 568)
    draw_found(scene, found, thin=True)
    for label, (scores, boxes, _) in classes.items():
        around = (*boxes[:, :2].amin(dim=0).tolist(), *boxes[:, 2:].amax(dim=0).tolist())
        scene.label(clipped(around), AMBER, f'{len(scores)} × {label}')
    canvas.center(300, 470, f'step 60: {len(found)} candidates with a score above {MIN_SCORE}', bold=False)


@figure()
def nms_overlaps(canvas):
    """Of each class the best eight candidates, and how much they overlap the best one."""
    classes, y = candidates(), 16
    for label, (scores, _, overlaps) in classes.items():
        shown = min(len(scores), 8)
        rows = [[label, *map(str, range(1, shown + 1))], ['score', *(f'{score:.2f}' for score in scores[:shown])],
                ['overlap', *(f'{overlap:.2f}' for overlap in overlaps[:shown])]]
        fills = {(row, i): tint(BLUE if i == 1 else GRAY) for row in (1, 2) for i in range(1, shown + 1)
                 if overlaps[i - 1] > MAX_OVERLAP}
        canvas.table(16, y, (96, *[59] * shown), rows, fills)
        y += 125
        if min(overlaps) > MAX_OVERLAP:
            canvas.text(16, y, f'{label} 1 suppresses all {len(scores) - 1} others: they overlap it by '
                        f'{min(overlaps):.2f} to {max(overlaps[1:]):.2f}')
        y += 24
    overlap = find_jaccard_overlap(classes['dog'][1][:1], classes['bicycle'][1][:1]).item()
    canvas.text(16, y + 12, f'dog 1 and bicycle 1, which overlap by {overlap:.2f}, would both stay\n'
                'at any overlap: classes never suppress each other', bold=True)
    canvas.height = y + 56


@figure(height=486)
def nms_result(canvas):
    """What suppression leaves at step 60, and what is missed."""
    said = read('teach')['steps']['60']
    scene = Scene(canvas, DOG, 16, 16, 568)
    scene.box(BOXES[3].tolist(), PURPLE, dashed=True)
    draw_found(scene, said['objects'])
    canvas.center(300, 470, f'missed: the motorbike; its only prior is {100 * said["motorbike"]:.0f}% sure', bold=False)
