"""Slow and plain: what the fast code must agree with, each transcribed from its definition with lists and loops.

Boxes are (x_min, y_min, x_max, y_max) or, where a name ends in cxcy, (c_x, c_y, w, h), in plain Python numbers.
"""

import math
from fractions import Fraction

from torch import cat
from torch.nn import functional as F

# Stride, padding and dilation of the convolutions; 1, 1, 1 where nothing else is said.
CONVOLUTIONS = {'conv6': (1, 6, 6), 'conv7': (1, 0), 'conv8_1': (1, 0), 'conv8_2': (2, 1), 'conv9_1': (1, 0),
                'conv9_2': (2, 1), 'conv10_1': (1, 0), 'conv10_2': (1, 0), 'conv11_1': (1, 0), 'conv11_2': (1, 0)}
# Kernel, stride and padding of the pooling after a layer; dilation, and whether to round up.
POOLINGS = {'conv1_2': (2, 2, 0), 'conv2_2': (2, 2, 0), 'conv3_3': (2, 2, 0, 1, True), 'conv4_3': (2, 2, 0),
            'conv5_3': (3, 1, 1)}


def ssd300(weights, images, n_classes):
    """The whole network as one function of its state dict: locs (N, 8732, 4), scores (N, 8732, n_classes)."""
    convs = [name.removesuffix('.weight') for name in weights if name.endswith('weight') and 'pred' not in name]
    out, locs, scores = images, [], []
    for conv in convs:
        name = conv.split('.')[1]
        out = F.conv2d(out, weights[f'{conv}.weight'], weights[f'{conv}.bias'], *CONVOLUTIONS.get(name, (1, 1)))
        out = out.clamp(min=0)
        if f'pred_convs.loc_{name}.weight' in weights:
            feature = out
            if name == 'conv4_3':
                feature = out / out.pow(2).sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12) * weights['rescale_factors']
            for kind, rows, size in (('loc', locs, 4), ('cl', scores, n_classes)):
                head = f'pred_convs.{kind}_{name}'
                output = F.conv2d(feature, weights[f'{head}.weight'], weights[f'{head}.bias'], padding=1)
                rows.append(output.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, size)))
        if name in POOLINGS:
            out = F.max_pool2d(out, *POOLINGS[name])
    return cat(locs, dim=1), cat(scores, dim=1)


def iou(a, b):
    """The area that two boxes share, divided by the area that they cover together."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def non_maximum_suppression(boxes, class_scores, min_score, max_overlap, top_k, max_candidates=400):
    """Greedy suppression, class by class, of the best candidates of one image.

    class_scores[i] are the scores of box i for the classes 1, 2, …; returns at most top_k (box, label, score), highest
    score first; equal scores in the order of the classes, then of the boxes.
    """
    detections = []
    for label in range(1, len(class_scores[0]) + 1):
        candidates = [i for i in range(len(boxes)) if class_scores[i][label - 1] > min_score]
        candidates.sort(key=lambda i: -class_scores[i][label - 1])
        kept = []
        for i in candidates[:max_candidates]:
            if all(iou(boxes[i], boxes[better]) <= max_overlap for better in kept):
                kept.append(i)
        detections += [(-class_scores[i][label - 1], label, i) for i in kept]
    return [(boxes[i], label, -score) for score, label, i in sorted(detections)[:top_k]]


def match(priors, boxes, threshold):
    """For each prior of an image the number of its object, or None."""
    overlaps = [[iou(box, prior) for prior in priors] for box in boxes]
    objects = []
    for i in range(len(priors)):
        best = max(range(len(boxes)), key=lambda j: overlaps[j][i], default=None)  # the first of equal ones
        objects.append(None if best is None or overlaps[best][i] < threshold else best)
    for j in range(len(boxes)):
        objects[overlaps[j].index(max(overlaps[j]))] = j
    return objects


def offsets(box, prior_cxcy):
    """The offsets of a box from a prior, with the factors of the Caffe code."""
    c_x, c_y, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]
    prior_x, prior_y, prior_w, prior_h = prior_cxcy
    return [(c_x - prior_x) / (prior_w / 10), (c_y - prior_y) / (prior_h / 10),
            5 * math.log(w / prior_w), 5 * math.log(h / prior_h)]


def cross_entropy(scores, label):
    """Minus the logarithm of the softmax at the label."""
    highest = max(scores)
    return highest + math.log(sum(math.exp(score - highest) for score in scores)) - scores[label]


def smooth_l1(difference):
    return difference ** 2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def multibox_loss(priors_cxcy, locs, scores, boxes, labels, threshold=0.5, neg_pos_ratio=3, localization=smooth_l1):
    """The parts of SSD's loss for a batch: confidence, localization. All arguments have one list per image."""
    priors = [(c_x - w / 2, c_y - h / 2, c_x + w / 2, c_y + h / 2) for c_x, c_y, w, h in priors_cxcy]
    confidence = of_boxes = n_positives = 0
    for image in range(len(locs)):
        objects = match(priors, boxes[image], threshold)
        positives = [i for i in range(len(priors)) if objects[i] is not None]
        for i in positives:
            true = offsets(boxes[image][objects[i]], priors_cxcy[i])
            of_boxes += sum(localization(value - t) for value, t in zip(locs[image][i], true))
            confidence += cross_entropy(scores[image][i], labels[image][objects[i]])
        negatives = [cross_entropy(scores[image][i], 0) for i in range(len(priors)) if objects[i] is None]
        confidence += sum(sorted(negatives, reverse=True)[:neg_pos_ratio * len(positives)])
        n_positives += len(positives)
    if n_positives == 0:
        return 0.0, 0.0
    return confidence / n_positives, of_boxes / (4 * n_positives)


def precision_recall(detections, objects, is_enough=lambda highest: highest > 0.5, overlap=iou):
    """(recall, precision) after each detection of one class that counts, highest score first. Detections are (image,
    score, box), objects (image, box, difficult)."""
    n_objects = sum(not difficult for _, _, difficult in objects)
    found, n_true, n_false, curve = set(), 0, 0, []
    for image, _, box in sorted(detections, key=lambda detection: -detection[1]):  # equal scores stay in order
        most, highest = None, 0
        for number, (object_image, object_box, _) in enumerate(objects):
            if object_image == image and overlap(box, object_box) > highest:
                most, highest = number, overlap(box, object_box)
        if most is None or not is_enough(highest) or most in found:
            n_false += 1
        elif objects[most][2]:
            continue
        else:
            found.add(most)
            n_true += 1
        curve.append((Fraction(n_true, max(n_objects, 1)), Fraction(n_true, n_true + n_false)))
    return curve if n_objects else None


def eleven_points(curve):
    """VOC 2007's AP."""
    if curve is None:
        return math.nan
    highest_precisions = [max((precision for recall, precision in curve if recall >= Fraction(t, 10)), default=0)
                          for t in range(11)]
    return float(sum(highest_precisions) / Fraction(11))


def area(curve):
    """VOC 2010's AP: the area under the curve, whose height at a recall is the best precision from there on."""
    if curve is None:
        return math.nan
    total, before = Fraction(0), Fraction(0)
    for i, (recall, _) in enumerate(curve):
        total += (recall - before) * max(precision for _, precision in curve[i:])
        before = recall
    return float(total)


def pixel_iou(a, b):
    """The overlap as VOC's development kit measures it: a box from 10 to 20 is 11 pixels wide."""
    return iou((a[0], a[1], a[2] + 1, a[3] + 1), (b[0], b[1], b[2] + 1, b[3] + 1))


def devkit_average_precision(lines, objects):
    """AP of one class as VOC's development kit (VOCevaldet) scores a result file: its lines are detections, "name score
    xmin ymin xmax ymax", and objects (name, box, difficult), both in pixels counted from 1."""
    detections = [(name, float(score), [float(value) for value in box])
                  for name, score, *box in (line.split() for line in lines)]
    return eleven_points(precision_recall(detections, objects, lambda highest: highest >= 0.5, pixel_iou))
