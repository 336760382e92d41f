"""SSD300 (Liu et al., "SSD: Single Shot MultiBox Detector", arXiv 1512.02325).

In reading order: the network, its loss, the suppression of duplicate detections, weights from elsewhere.
Shapes in the comments: N images in a batch, 8732 priors, n_classes including the background, which is class 0.
"""

from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG16_Weights
from torchvision.models.detection import SSD300_VGG16_Weights
from torchvision.ops import batched_nms

from utils import (IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD, InputError, cxcy_to_gcxgcy, cxcy_to_xy, decimate,
                   download_weights, find_jaccard_overlap, gcxgcy_to_cxcy, is_checkpoint, make_label_map,
                   mean_over_processes, read_checkpoint_file, require, voc_labels, xy_to_cxcy)

# ------------------------------------------------------------------------------------------ network

class FeatureMap(NamedTuple):
    name: str  # the convolution whose output it is
    channels: int
    grid: int  # positions per side
    scale: float  # side of a square prior, as a fraction of the image's side
    ratios: tuple[float, ...]  # width / height of the priors

    @property
    def n_priors(self) -> int:
        return len(self.ratios) + 1  # at each position: one per ratio, and the extra one


# The six maps of the paper (section 2.2). This one table makes both the priors and the prediction convolutions, so
# that the i-th prediction belongs to the i-th prior. The original tutorial's weights were trained with 0.333, not 1/3.
FEATURE_MAPS = (
    FeatureMap('conv4_3', 512, 38, 0.1, (1, 2, 0.5)),
    FeatureMap('conv7', 1024, 19, 0.2, (1, 2, 3, 0.5, 0.333)),
    FeatureMap('conv8_2', 512, 10, 0.375, (1, 2, 3, 0.5, 0.333)),
    FeatureMap('conv9_2', 256, 5, 0.55, (1, 2, 3, 0.5, 0.333)),
    FeatureMap('conv10_2', 256, 3, 0.725, (1, 2, 0.5)),
    FeatureMap('conv11_2', 256, 1, 0.9, (1, 2, 0.5)),
)


class VGGBase(nn.Module):
    """VGG-16 without its classifier: the source of the two lower feature maps."""

    def __init__(self):
        super().__init__()
        self.conv1_1 = nn.Conv2d(3, 64, kernel_size=3, padding=1)
        self.conv1_2 = nn.Conv2d(64, 64, kernel_size=3, padding=1)
        self.conv2_1 = nn.Conv2d(64, 128, kernel_size=3, padding=1)
        self.conv2_2 = nn.Conv2d(128, 128, kernel_size=3, padding=1)
        self.conv3_1 = nn.Conv2d(128, 256, kernel_size=3, padding=1)
        self.conv3_2 = nn.Conv2d(256, 256, kernel_size=3, padding=1)
        self.conv3_3 = nn.Conv2d(256, 256, kernel_size=3, padding=1)
        self.conv4_1 = nn.Conv2d(256, 512, kernel_size=3, padding=1)
        self.conv4_2 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.conv4_3 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.conv5_1 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.conv5_2 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.conv5_3 = nn.Conv2d(512, 512, kernel_size=3, padding=1)

        # fc6 and fc7 as convolutions. conv6 keeps 3×3 of fc6's 7×7 values, 3 apart. pool5 no longer halves the
        # map, so everything is twice as far apart as before: the dilation is 3 · 2.
        self.conv6 = nn.Conv2d(512, 1024, kernel_size=3, padding=6, dilation=6)
        self.conv7 = nn.Conv2d(1024, 1024, kernel_size=1)

        # For training without load_pretrained_layers(): a signal survives fifteen layers without normalization
        # only if the weights preserve its variance (He initialization).
        for conv in self.children():
            nn.init.kaiming_normal_(conv.weight, nonlinearity='relu')
            nn.init.zeros_(conv.bias)

    def forward(self, images):
        """images (N, 3, 300, 300) → feature maps conv4_3 (N, 512, 38, 38), conv7 (N, 1024, 19, 19)"""
        out = F.relu(self.conv1_1(images))  # (N, 64, 300, 300)
        out = F.relu(self.conv1_2(out))  # (N, 64, 300, 300)
        out = F.max_pool2d(out, kernel_size=2)  # (N, 64, 150, 150)
        out = F.relu(self.conv2_1(out))  # (N, 128, 150, 150)
        out = F.relu(self.conv2_2(out))  # (N, 128, 150, 150)
        out = F.max_pool2d(out, kernel_size=2)  # (N, 128, 75, 75)
        out = F.relu(self.conv3_1(out))  # (N, 256, 75, 75)
        out = F.relu(self.conv3_2(out))  # (N, 256, 75, 75)
        out = F.relu(self.conv3_3(out))  # (N, 256, 75, 75)
        out = F.max_pool2d(out, kernel_size=2, ceil_mode=True)  # (N, 256, 38, 38): 75 / 2 rounded up
        out = F.relu(self.conv4_1(out))  # (N, 512, 38, 38)
        out = F.relu(self.conv4_2(out))  # (N, 512, 38, 38)
        conv4_3 = F.relu(self.conv4_3(out))  # (N, 512, 38, 38)
        out = F.max_pool2d(conv4_3, kernel_size=2)  # (N, 512, 19, 19)
        out = F.relu(self.conv5_1(out))  # (N, 512, 19, 19)
        out = F.relu(self.conv5_2(out))  # (N, 512, 19, 19)
        out = F.relu(self.conv5_3(out))  # (N, 512, 19, 19)
        out = F.max_pool2d(out, kernel_size=3, stride=1, padding=1)  # (N, 512, 19, 19): not halved
        out = F.relu(self.conv6(out))  # (N, 1024, 19, 19)
        conv7 = F.relu(self.conv7(out))  # (N, 1024, 19, 19)
        return conv4_3, conv7

    def load_pretrained_layers(self):
        """Load torchvision's VGG-16, trained on ImageNet (downloads 528 MB, once). fc6 and fc7 become convolutions,
        decimated to the size of conv6 and conv7. Raises InputError if the download fails."""
        vgg16 = download_weights(VGG16_Weights.IMAGENET1K_V1, 'train with --no-pretrained')
        features = [tensor for name, tensor in vgg16.items() if name.startswith('features.')]
        weights = dict(zip(self.state_dict(), features))  # conv1_1 … conv5_3, in the same order there and here
        fc6 = vgg16['classifier.0.weight'].view(4096, 512, 7, 7)  # was (4096, 25088)
        fc7 = vgg16['classifier.3.weight'].view(4096, 4096, 1, 1)  # was (4096, 4096)
        weights['conv6.weight'] = decimate(fc6, m=(4, None, 3, 3))  # (1024, 512, 3, 3)
        weights['conv6.bias'] = decimate(vgg16['classifier.0.bias'], m=(4,))  # (1024)
        weights['conv7.weight'] = decimate(fc7, m=(4, 4, None, None))  # (1024, 1024, 1, 1)
        weights['conv7.bias'] = decimate(vgg16['classifier.3.bias'], m=(4,))  # (1024)
        self.load_state_dict(weights)

    def freeze_blocks(self, n_blocks):
        """Keep the first blocks (conv1_*, conv2_*, …) as they are: a training step then takes less time and memory."""
        for name, parameter in self.named_parameters():
            if int(name[len('conv')]) <= n_blocks:
                parameter.requires_grad_(False)


class AuxiliaryConvolutions(nn.Module):
    """Convolutions on top of the base: the source of the four upper feature maps."""

    def __init__(self):
        super().__init__()
        self.conv8_1 = nn.Conv2d(1024, 256, kernel_size=1)
        self.conv8_2 = nn.Conv2d(256, 512, kernel_size=3, stride=2, padding=1)
        self.conv9_1 = nn.Conv2d(512, 128, kernel_size=1)
        self.conv9_2 = nn.Conv2d(128, 256, kernel_size=3, stride=2, padding=1)
        self.conv10_1 = nn.Conv2d(256, 128, kernel_size=1)
        self.conv10_2 = nn.Conv2d(128, 256, kernel_size=3)
        self.conv11_1 = nn.Conv2d(256, 128, kernel_size=1)
        self.conv11_2 = nn.Conv2d(128, 256, kernel_size=3)
        init_xavier(self)

    def forward(self, conv7):
        """conv7 (N, 1024, 19, 19) → feature maps conv8_2, conv9_2, conv10_2, conv11_2, of the sizes below"""
        out = F.relu(self.conv8_1(conv7))  # (N, 256, 19, 19)
        conv8_2 = F.relu(self.conv8_2(out))  # (N, 512, 10, 10)
        out = F.relu(self.conv9_1(conv8_2))  # (N, 128, 10, 10)
        conv9_2 = F.relu(self.conv9_2(out))  # (N, 256, 5, 5)
        out = F.relu(self.conv10_1(conv9_2))  # (N, 128, 5, 5)
        conv10_2 = F.relu(self.conv10_2(out))  # (N, 256, 3, 3)
        out = F.relu(self.conv11_1(conv10_2))  # (N, 128, 3, 3)
        conv11_2 = F.relu(self.conv11_2(out))  # (N, 256, 1, 1)
        return conv8_2, conv9_2, conv10_2, conv11_2


class PredictionConvolutions(nn.Module):
    """Two 3×3 convolutions per feature map. For each prior at each position, one predicts the offsets of an
    object's box from the prior, the other one the scores of the classes."""

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes = n_classes
        for feature_map in FEATURE_MAPS:
            name, channels, n_priors = feature_map.name, feature_map.channels, feature_map.n_priors
            setattr(self, f'loc_{name}', nn.Conv2d(channels, n_priors * 4, kernel_size=3, padding=1))
            setattr(self, f'cl_{name}', nn.Conv2d(channels, n_priors * n_classes, kernel_size=3, padding=1))
        init_xavier(self)

    def forward(self, *features):
        """The six feature maps in FEATURE_MAPS' order → locs (N, 8732, 4), scores (N, 8732, n_classes)"""
        locs, scores = [], []
        for feature_map, feature in zip(FEATURE_MAPS, features, strict=True):
            loc = getattr(self, f'loc_{feature_map.name}')(feature)  # (N, n_priors · 4, grid, grid)
            score = getattr(self, f'cl_{feature_map.name}')(feature)  # (N, n_priors · n_classes, grid, grid)
            # Channels last, so that reshaping walks row by row, position by position, prior by prior:
            # the order in which create_prior_boxes() makes the priors.
            loc = loc.permute(0, 2, 3, 1)  # (N, grid, grid, n_priors · 4)
            score = score.permute(0, 2, 3, 1)  # (N, grid, grid, n_priors · n_classes)
            n_rows = feature_map.grid ** 2 * feature_map.n_priors
            locs.append(loc.reshape(-1, n_rows, 4))  # (N, grid² · n_priors, 4)
            scores.append(score.reshape(-1, n_rows, self.n_classes))  # (N, grid² · n_priors, n_classes)
        return torch.cat(locs, dim=1), torch.cat(scores, dim=1)


def init_xavier(module):
    """Initialize all layers of a module with uniform Xavier weights and zero biases."""
    for conv in module.children():
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)


class SSD300(nn.Module):
    """The whole network: base, auxiliary and prediction convolutions."""

    # How images are normalized, and whether boxes are clipped at the edges. Weights from elsewhere bring their own.
    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD
    clip_boxes = False

    def __init__(self, n_classes):
        """:param n_classes: number of classes including the background: 21 for VOC"""
        super().__init__()
        self.n_classes = n_classes
        self.base = VGGBase()
        self.aux_convs = AuxiliaryConvolutions()
        self.pred_convs = PredictionConvolutions(n_classes)
        # conv4_3's values are on a different scale than those of the maps above. So they are scaled to unit length at
        # each position; each channel is then multiplied by a learned factor, at first 20 (paper, section 3.1).
        self.rescale_factors = nn.Parameter(torch.full((1, 512, 1, 1), 20.0))
        # A buffer moves with the network to any device. The state dict doesn't have it, nor do published weights.
        self.register_buffer('priors_cxcy', self.create_prior_boxes(), persistent=False)

    def forward(self, images):
        """images (N, 3, 300, 300) → offsets from the priors (N, 8732, 4), scores before softmax (N, 8732, n_classes)"""
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f'images must be of shape (N, 3, 300, 300), not {tuple(images.shape)}')
        conv4_3, conv7 = self.base(images)  # (N, 512, 38, 38), (N, 1024, 19, 19)
        # In float32, even under autocast: a sum of 512 squares needs it. normalize() never divides by 0.
        rescaled = F.normalize(conv4_3.float(), dim=1) * self.rescale_factors  # (N, 512, 38, 38)
        return self.pred_convs(rescaled, conv7, *self.aux_convs(conv7))

    @staticmethod
    def create_prior_boxes():
        """Return the 8732 priors in fractional center-size coordinates (8732, 4), map by map (paper, section 2.2)."""
        priors = []
        for i, (_, _, grid, scale, ratios) in enumerate(FEATURE_MAPS):
            # The extra prior is a square between this scale and the next. The last map has no next one: the
            # original tutorial, and so its published weights, take 1.0 there.
            extra = sqrt(scale * FEATURE_MAPS[i + 1].scale) if i + 1 < len(FEATURE_MAPS) else 1.0
            priors += lay_out_priors(grid, grid, scale, extra, ratios)
        priors = torch.tensor(priors)  # (8732, 4)
        # No prior is wider or higher than the image. As in the original tutorial, this shrinks 20 of them, on
        # the two uppermost maps. 2740 reach beyond an edge of the image and stay so, as in the Caffe code.
        priors[:, 2:].clamp_(max=1)
        return priors

    def decode(self, predicted_locs, predicted_scores):
        """The output → boxes in fractional boundary coordinates (N, 8732, 4), probabilities (N, 8732, n_classes)"""
        boxes = cxcy_to_xy(gcxgcy_to_cxcy(predicted_locs.float(), self.priors_cxcy))  # (N, 8732, 4)
        if self.clip_boxes:
            boxes = boxes.clamp(0, 1)
        return boxes, predicted_scores.float().softmax(dim=2)

    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap, top_k):
        """Turn the network's output into objects.

        :param predicted_locs, predicted_scores: (N, 8732, 4) and (N, 8732, n_classes), before softmax
        :param min_score: candidates must have a higher score
        :param max_overlap: of two boxes of one class that overlap by more than this, the better one is kept
        :param top_k: keep at most this many objects per image, those with the highest scores
        :return: three lists with a tensor per image, highest score first: boxes in fractional boundary coordinates
            (n, 4), labels (n), scores (n); n may be 0
        """
        boxes, probabilities = self.decode(predicted_locs, predicted_scores)
        detections = [suppress_duplicates(image_boxes, class_scores, min_score, max_overlap, top_k)
                      for image_boxes, class_scores in zip(boxes, probabilities[:, :, 1:])]
        return tuple([detection[i] for detection in detections] for i in range(3))


def lay_out_priors(grid, n_tiles, scale, extra, ratios) -> list[tuple[float, ...]]:
    """Return (c_x, c_y, w, h) of one map's priors: row by row, position by position; at each position the first
    ratio, the extra prior (a square with this side), the other ratios. The image is n_tiles tiles wide."""
    # A prior of scale s and ratio a is s·√a wide and s/√a high: its area is s² whatever its ratio.
    first, *others = [(scale * sqrt(ratio), scale / sqrt(ratio)) for ratio in ratios]
    sizes = [first, (extra, extra), *others]
    centers = [(place + 0.5) / n_tiles for place in range(grid)]  # of the tiles in a row or column
    return [(c_x, c_y, w, h) for c_y in centers for c_x in centers for w, h in sizes]


# --------------------------------------------------------------------------------------------- loss

class MultiBoxLoss(nn.Module):
    """The loss of SSD (paper, section 2.2): of the classes (confidence) and of the boxes (localization)."""

    def __init__(self, priors_cxcy, threshold=0.5, neg_pos_ratio=3, alpha=1.0, localization='smooth_l1',
                 min_negatives=0):
        """
        :param priors_cxcy: priors in center-size coordinates (8732, 4)
        :param threshold: a prior is positive if it overlaps an object by at least this much
        :param neg_pos_ratio: hard negatives per positive prior
        :param alpha: weight of the localization loss
        :param localization: 'smooth_l1' as in the paper; the original tutorial's weights used 'l1', by mistake
        :param min_negatives: fewest hard negatives per image; 0 as in the paper: images without objects teach nothing
        """
        super().__init__()
        if localization not in ('smooth_l1', 'l1'):
            raise ValueError(f"localization must be 'smooth_l1' or 'l1', not {localization!r}")
        self.threshold = threshold
        self.neg_pos_ratio = neg_pos_ratio
        self.alpha = alpha
        self.localization_loss = F.smooth_l1_loss if localization == 'smooth_l1' else F.l1_loss
        self.min_negatives = min_negatives
        self.register_buffer('priors_cxcy', priors_cxcy, persistent=False)
        self.register_buffer('priors_xy', cxcy_to_xy(priors_cxcy), persistent=False)

    def forward(self, predicted_locs, predicted_scores, boxes, labels):
        """Return the loss, a scalar; for the arguments see `parts`."""
        confidence, localization = self.parts(predicted_locs, predicted_scores, boxes, labels)
        return confidence + self.alpha * localization

    def parts(self, predicted_locs, predicted_scores, boxes, labels):
        """Return the confidence loss and the localization loss, both scalars.

        :param predicted_locs, predicted_scores: (N, 8732, 4) and (N, 8732, n_classes), before softmax
        :param boxes: N tensors, the objects of each image in fractional boundary coordinates (n, 4); n may be 0
        :param labels: N tensors, their classes (n)
        """
        predicted_locs, predicted_scores = predicted_locs.float(), predicted_scores.float()  # after autocast
        true_boxes = torch.empty_like(predicted_locs)  # (N, 8732, 4)
        true_classes = torch.empty_like(predicted_scores[:, :, 0], dtype=torch.long)  # (N, 8732)
        for i, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
            true_boxes[i], true_classes[i] = self.match(image_boxes, image_labels)
        positive = true_classes > 0  # (N, 8732)
        n_positives = positive.sum(dim=1)  # (N)
        n_positives_in_batch = mean_over_processes(n_positives.sum())

        # Localization: positive priors only, since there is no right box around nothing. The paper adds up the
        # four offsets of a box. This is their mean, a quarter of that, as for the published weights.
        true_locs = cxcy_to_gcxgcy(xy_to_cxcy(true_boxes), self.priors_cxcy)  # (N, 8732, 4)
        loc_loss = self.localization_loss(predicted_locs, true_locs, reduction='none').sum(dim=2)  # (N, 8732)
        loc_loss = torch.where(positive, loc_loss, 0).sum() / (4 * n_positives_in_batch)

        # Confidence: the positive priors and, in each image, three times as many negative ones. If all thousands
        # of negatives counted, answering "background" everywhere would cost almost nothing. The hardest ones,
        # those with the highest loss, teach the most.
        conf_loss = F.cross_entropy(predicted_scores.flatten(0, 1), true_classes.flatten(), reduction='none')
        conf_loss = conf_loss.view(positive.shape)  # (N, 8732)
        negative_losses = torch.where(positive, 0, conf_loss).sort(dim=1, descending=True).values  # (N, 8732)
        rank = torch.arange(negative_losses.shape[1], device=negative_losses.device)  # (8732)
        n_negatives = (self.neg_pos_ratio * n_positives).clamp(min=self.min_negatives)  # (N)
        hard = rank < n_negatives[:, None]  # (N, 8732)
        conf_loss = torch.where(positive, conf_loss, 0).sum() + torch.where(hard, negative_losses, 0).sum()
        return conf_loss / n_positives_in_batch, loc_loss

    @torch.no_grad()
    def match(self, boxes, labels):
        """Assign an object or the background to each prior of one image, with boxes (n, 4) and labels (n).

        :return: the box of each prior's object in boundary coordinates (8732, 4), the prior itself if it has none;
            the class of each prior (8732), 0 for the background
        """
        if len(boxes) == 0:
            return self.priors_xy, torch.zeros_like(self.priors_xy[:, 0], dtype=torch.long)

        # 1. Compute the Jaccard overlap of each object with each prior.
        overlap = find_jaccard_overlap(boxes, self.priors_xy)  # (n, 8732)

        # 2. Each prior's match is the object that it overlaps most.
        highest_overlap, best_object = overlap.max(dim=0)  # (8732)

        # 3. Each object claims the prior that overlaps it most, whatever the overlap: otherwise it might be left
        #    without any. If two objects claim the same prior, the later one in the list gets it.
        best_prior = overlap.argmax(dim=1)  # (n)
        numbers = torch.arange(len(boxes), device=boxes.device)  # (n)
        best_object.scatter_reduce_(0, best_prior, numbers, 'amax', include_self=False)  # the later: the maximum
        highest_overlap.index_fill_(0, best_prior, 1)

        # 4. A prior whose overlap is below the threshold is negative: its class is the background.
        # 5. All others are positive: they get the class and the box of their object.
        positive = highest_overlap >= self.threshold  # (8732)
        true_classes = torch.where(positive, labels[best_object], 0)  # (8732)
        true_boxes = torch.where(positive[:, None], boxes[best_object], self.priors_xy)  # (8732, 4)
        return true_boxes, true_classes


# ---------------------------------------------------------------------------------------- detection

def suppress_duplicates(boxes, class_scores, min_score, max_overlap, top_k, max_candidates=400):
    """Non-maximum suppression in one image: boxes (8732, 4) in boundary coordinates, class_scores
    (8732, n_classes − 1) without the background's. For the rest see `SSD300.detect_objects`."""
    # The best 400 candidates of each class, as in the authors' Caffe code. One prior may find several classes.
    scores, priors = class_scores.topk(min(max_candidates, len(class_scores)), dim=0)  # (400, n_classes − 1)
    is_candidate = (scores > min_score) & boxes.isfinite().all(dim=1)[priors]  # (400, n_classes − 1)
    scores, priors = scores[is_candidate], priors[is_candidate]  # (n_candidates)
    labels = is_candidate.nonzero()[:, 1] + 1  # (n_candidates): counted from 1
    # batched_nms keeps classes apart by moving each to a place of its own: far enough if no coordinate is negative.
    shifted = boxes[priors] - boxes.nan_to_num(0, 0, 0).min()  # (n_candidates, 4)
    kept = batched_nms(shifted, scores, labels, max_overlap)[:top_k]  # (n), highest score first
    return boxes[priors[kept]], labels[kept], scores[kept]


# ------------------------------------------------------------------------------ weights from elsewhere

def load_model(checkpoint_path) -> tuple[SSD300, dict[str, int]]:
    """Return the network of a checkpoint, on the CPU and ready for detection, and its label map. A checkpoint is a
    file of train.py, of the original tutorial's code, or of one of the `PEERS`; 'coco' downloads torchvision's
    SSD300, trained on COCO (136 MB, once). Raises InputError if it can't be used."""
    checkpoint = load_any_checkpoint(checkpoint_path)
    model = SSD300(n_classes=len(checkpoint['label_map']))
    load_weights(model, checkpoint, checkpoint_path)
    return model.eval(), checkpoint['label_map']


def load_weights(model, checkpoint, checkpoint_path):
    """Copy a loaded checkpoint into a network. Raises InputError if the weights don't fit."""
    try:
        model.load_state_dict(checkpoint['model'])
        if 'priors_cxcy' in checkpoint:  # older checkpoints don't have this part: the defaults are right for them
            model.priors_cxcy.copy_(checkpoint['priors_cxcy'])
            for name in ('image_mean', 'image_std', 'clip_boxes'):
                setattr(model, name, checkpoint[name])
    except (RuntimeError, AttributeError, TypeError):
        raise InputError(f"the weights in checkpoint '{checkpoint_path}' aren't those of an SSD300 with "
                         f'{model.n_classes} classes and these FEATURE_MAPS: choose another checkpoint') from None


def start_from_checkpoint(model, checkpoint_path, label_map):
    """Start fine-tuning: copy a checkpoint into a new network. Of the class heads, only the filters of labels that
    the checkpoint knows are copied. Raises InputError if it can't be used."""
    checkpoint = load_any_checkpoint(checkpoint_path)
    weights, trained_label_map = checkpoint['model'], checkpoint['label_map']
    load_weights(SSD300(len(trained_label_map)), checkpoint, checkpoint_path)  # only to see whether they fit
    for name, head in model.state_dict().items():
        if name.startswith('pred_convs.cl_'):  # one filter per prior and class: (n_priors · n_classes, …)
            head = head.clone().unflatten(0, (-1, len(label_map)))  # (n_priors, n_classes, …)
            trained_head = weights[name].unflatten(0, (-1, len(trained_label_map)))
            for label in label_map.keys() & trained_label_map.keys():
                head[:, label_map[label]] = trained_head[:, trained_label_map[label]]
            weights[name] = head.flatten(0, 1)
    load_weights(model, checkpoint, checkpoint_path)
    new = ', '.join(label for label in label_map if label not in trained_label_map)
    print(f'Fine-tuning {checkpoint_path}' + (f'; the class heads start from scratch for {new}' if new else ''))
    if not torch.allclose(model.priors_cxcy, SSD300.create_prior_boxes(), atol=1e-5):
        print(f'The priors are those of {checkpoint_path}, not those that FEATURE_MAPS makes')


class Peer(NamedTuple):
    """Another implementation of the same network: the prefixes of its tensors' names, and what differs from ours. The
    tensors come in our order. The defaults are those of the authors' Caffe code."""
    convs: tuple[str, ...]  # the layers conv1_1 … conv11_2
    rescale_factors: str
    loc: str  # the six localization convolutions
    cl: str  # the six class convolutions
    scales: tuple[float, ...] = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)  # of the priors; one more than maps
    clip_centers: bool = True  # whether the centers of priors are kept inside the image
    image_mean: tuple[float, ...] = (123 / 255, 117 / 255, 104 / 255)  # its images range from 0 to 255
    image_std: tuple[float, ...] = (1 / 255, 1 / 255, 1 / 255)
    clip_boxes: bool = False


PEERS = {
    'amdegroot/ssd.pytorch': Peer(('vgg.', 'extras.'), 'L2Norm.weight', 'loc.', 'conf.'),
    'lufficc/SSD': Peer(('backbone.vgg.', 'backbone.extras.'), 'backbone.l2_norm.weight',
                        'box_head.predictor.reg_headers.', 'box_head.predictor.cls_headers.'),
    'torchvision': Peer(('backbone.features.', 'backbone.extra.'), 'backbone.scale_weight',
                        'head.regression_head.', 'head.classification_head.',
                        scales=(0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05), clip_centers=False,
                        image_mean=(0.48235, 0.45882, 0.40784), clip_boxes=True),
}


def load_any_checkpoint(path) -> dict:
    """Return a checkpoint of ours, or the weights of one of the peers in the same form; see `load_model`."""
    if path == 'coco':
        return from_peer(download_weights(SSD300_VGG16_Weights.COCO_V1, 'choose another checkpoint'), 'torchvision')
    content = read_checkpoint_file(path)
    if is_checkpoint(content):
        return content
    # Some files are the weights, others have them under a key, beside an optimizer and the like.
    weights = content.get('model', content) if isinstance(content, dict) else None
    for name, peer in PEERS.items():
        if isinstance(weights, dict) and peer.rescale_factors in weights:
            return from_peer(weights, name)
    raise InputError(f"'{path}' has no weights of a known kind: choose a checkpoint of train.py or of the original "
                     f"tutorial, or weights of {', '.join(PEERS)}")


def from_peer(state_dict, name) -> dict:
    """Convert the weights of one of the `PEERS` to a checkpoint of ours that predicts the same. Raises InputError
    for those of another network than SSD300, or for other classes than VOC's or COCO's."""
    peer = PEERS[name]

    def tensors(prefix):  # of each layer its weight, then its bias
        return [tensor for key, tensor in state_dict.items() if key.startswith(prefix)]

    with torch.device('meta'):  # only the names of the weights are needed
        own_names = [key for key in SSD300(n_classes=1).state_dict() if key.startswith(('base.', 'aux_convs.'))]
    convs, heads = tensors(peer.convs), {'loc': tensors(peer.loc), 'cl': tensors(peer.cl)}
    n_classes = len(heads['cl'][-1]) // FEATURE_MAPS[-1].n_priors if heads['cl'] else 0
    coco_labels = [f'{label} {i}' if label == 'N/A' else label  # some numbers have no class
                   for i, label in enumerate(SSD300_VGG16_Weights.COCO_V1.meta['categories'])]
    labels = {21: voc_labels, 91: coco_labels[1:]}
    require(len(convs) == len(own_names) and n_classes in labels,
            f"these weights of {name} aren't those of its SSD300 with VOC's 21 or COCO's 91 classes: choose others")

    weights = dict(zip(own_names, convs))
    weights['rescale_factors'] = state_dict[peer.rescale_factors].view(1, 512, 1, 1)
    places = [(feature_map, part) for feature_map in FEATURE_MAPS for part in ('weight', 'bias')]
    for kind, head_tensors in heads.items():
        for (feature_map, part), tensor in zip(places, head_tensors):
            # At each position, their priors come in the order 1, extra, 2, 1/2, 3, 1/3; our i-th is their order[i]-th.
            order = [0, 1, 2, 4, 3, 5] if feature_map.n_priors == 6 else [0, 1, 2, 3]
            tensor = tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)
            weights[f'pred_convs.{kind}_{feature_map.name}.{part}'] = tensor
    return {'epoch': 0, 'model': weights, 'label_map': make_label_map(labels[n_classes]), 'settings': {},
            'priors_cxcy': caffe_priors(peer.scales, peer.clip_centers), 'clip_boxes': peer.clip_boxes,
            'image_mean': list(peer.image_mean), 'image_std': list(peer.image_std)}


def caffe_priors(scales, clip_centers):
    """Return the priors of those who follow the authors' Caffe code, center-size (8732, 4). Their centers are whole
    pixels apart. 19 of conv8_2's are 4 pixels outside the image; some implementations move them inside."""
    priors = []
    for i, (step, feature_map) in enumerate(zip((8, 16, 32, 64, 100, 300), FEATURE_MAPS)):
        ratios = (1, 2, 3, 1 / 2, 1 / 3) if feature_map.n_priors == 6 else (1, 2, 1 / 2)
        extra = sqrt(scales[i] * scales[i + 1])
        priors += lay_out_priors(feature_map.grid, IMAGE_SIZE / step, scales[i], extra, ratios)
    priors = torch.tensor(priors)  # (8732, 4)
    priors[:, 2:].clamp_(max=1)
    if clip_centers:
        priors[:, :2].clamp_(max=1)
    return priors
