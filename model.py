"""SSD300 (Liu et al., "SSD: Single Shot MultiBox Detector", arXiv 1512.02325).

In reading order: the network, the loss that trains it, detection, and weights from elsewhere.
Shapes in the comments: N images in a batch, 8732 priors, n_classes with the background as class 0.
"""

import pickle
from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models import VGG16_Weights
from torchvision.models.detection import SSD300_VGG16_Weights
from torchvision.ops import batched_nms

from utils import (IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD, InputError, cxcy_to_gcxgcy, cxcy_to_xy, decimate,
                   find_jaccard_overlap, gcxgcy_to_cxcy, is_checkpoint, make_label_map, read_checkpoint_file, require,
                   several_processes, voc_labels, xy_to_cxcy)

# ------------------------------------------------------------------------------------------ network

class FeatureMap(NamedTuple):
    name: str  # of the convolution whose output it is
    channels: int
    grid: int  # positions per side
    scale: float  # side of a square prior, as a fraction of the image's side
    ratios: tuple[float, ...]  # width / height of the priors

    @property
    def n_priors(self) -> int:
        """Priors at each position: one per ratio, and the extra one."""
        return len(self.ratios) + 1


# The six maps as the paper has them (section 2.2; the authors' Caffe code uses other scales). Priors
# and prediction convolutions are both made from this table, so that the i-th prediction belongs to the
# i-th prior. 0.333 rather than 1/3, since the tutorial's published weights were trained with it.
FEATURE_MAPS = (
    FeatureMap('conv4_3', 512, 38, 0.1, (1, 2, 0.5)),
    FeatureMap('conv7', 1024, 19, 0.2, (1, 2, 3, 0.5, 0.333)),
    FeatureMap('conv8_2', 512, 10, 0.375, (1, 2, 3, 0.5, 0.333)),
    FeatureMap('conv9_2', 256, 5, 0.55, (1, 2, 3, 0.5, 0.333)),
    FeatureMap('conv10_2', 256, 3, 0.725, (1, 2, 0.5)),
    FeatureMap('conv11_2', 256, 1, 0.9, (1, 2, 0.5)),
)

# Where torchvision's vgg16 has these layers among its `features`.
VGG16_PLACES = {'conv1_1': 0, 'conv1_2': 2, 'conv2_1': 5, 'conv2_2': 7, 'conv3_1': 10, 'conv3_2': 12, 'conv3_3': 14,
                'conv4_1': 17, 'conv4_2': 19, 'conv4_3': 21, 'conv5_1': 24, 'conv5_2': 26, 'conv5_3': 28}


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

        # fc6 and fc7 as convolutions. conv6 keeps 3×3 of fc6's 7×7 values, 3 apart; and since pool5 no
        # longer halves the map, everything lies twice as far apart as before: a dilation of 3 · 2.
        self.conv6 = nn.Conv2d(512, 1024, kernel_size=3, padding=6, dilation=6)
        self.conv7 = nn.Conv2d(1024, 1024, kernel_size=1)

        # For training without load_pretrained_layers(): fifteen layers deep without normalization,
        # only weights that preserve the variance (He initialization) let a signal through.
        for conv in self.children():
            nn.init.kaiming_normal_(conv.weight, nonlinearity='relu')
            nn.init.zeros_(conv.bias)

    def forward(self, image):
        """image (N, 3, 300, 300) → feature maps conv4_3 (N, 512, 38, 38), conv7 (N, 1024, 19, 19)"""
        out = F.relu(self.conv1_1(image))  # (N, 64, 300, 300)
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
        """Takes over torchvision's VGG-16, trained on ImageNet (a download of 528 MB, once): fc6 and fc7 are
        reshaped to the convolutions that they are, and decimated to conv6 and conv7. Raises InputError if
        the download fails."""
        vgg16 = download_weights(VGG16_Weights.IMAGENET1K_V1, 'train with --no-pretrained')
        fc6 = vgg16['classifier.0.weight'].view(4096, 512, 7, 7)  # was (4096, 25088)
        fc7 = vgg16['classifier.3.weight'].view(4096, 4096, 1, 1)  # was (4096, 4096)
        weights = {'conv6.weight': decimate(fc6, m=(4, None, 3, 3)),  # (1024, 512, 3, 3)
                   'conv6.bias': decimate(vgg16['classifier.0.bias'], m=(4,)),  # (1024)
                   'conv7.weight': decimate(fc7, m=(4, 4, None, None)),  # (1024, 1024, 1, 1)
                   'conv7.bias': decimate(vgg16['classifier.3.bias'], m=(4,))}  # (1024)
        for name, place in VGG16_PLACES.items():
            weights[f'{name}.weight'] = vgg16[f'features.{place}.weight']
            weights[f'{name}.bias'] = vgg16[f'features.{place}.bias']
        self.load_state_dict(weights)

    def freeze_blocks(self, n_blocks):
        """Keeps the weights of the first blocks (conv1_*, conv2_*, …) as they are. A step then takes less
        time and memory, since autograd doesn't even record these layers."""
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
        """conv7 (N, 1024, 19, 19) → feature maps conv8_2 (N, 512, 10, 10), conv9_2 (N, 256, 5, 5),
        conv10_2 (N, 256, 3, 3), conv11_2 (N, 256, 1, 1)"""
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
    """Two 3×3 convolutions per feature map, which predict for each prior at each position the offsets of
    an object's box from the prior, and the scores of the classes."""

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
            # Channels last, so that flattening walks row by row, position by position, prior by prior:
            # the order in which create_prior_boxes() makes the priors.
            loc = loc.permute(0, 2, 3, 1)  # (N, grid, grid, n_priors · 4)
            score = score.permute(0, 2, 3, 1)  # (N, grid, grid, n_priors · n_classes)
            locs.append(loc.reshape(loc.shape[0], -1, 4))  # (N, grid² · n_priors, 4)
            scores.append(score.reshape(loc.shape[0], -1, self.n_classes))
        return torch.cat(locs, dim=1), torch.cat(scores, dim=1)


def init_xavier(module):
    """Uniform Xavier weights and zero biases for all layers of a module."""
    for conv in module.children():
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)


class SSD300(nn.Module):
    """The whole network: base, auxiliary and prediction convolutions."""

    # How images are normalized, and whether predicted boxes are cut at the image's edges. Networks from
    # elsewhere have values of their own.
    image_mean, image_std, clip_boxes = IMAGENET_MEAN, IMAGENET_STD, False

    def __init__(self, n_classes):
        """:param n_classes: number of classes, background included: 21 for VOC"""
        super().__init__()
        self.n_classes = n_classes
        self.base = VGGBase()
        self.aux_convs = AuxiliaryConvolutions()
        self.pred_convs = PredictionConvolutions(n_classes)
        # conv4_3's values are on a different scale than those of the maps above. So they are brought to
        # length 1 at each position, then each channel to a learned scale, starting at 20 (paper, section 3.1).
        self.rescale_factors = nn.Parameter(torch.full((1, 512, 1, 1), 20.0))
        # A buffer moves with the network to any device. Saving it in the state dict would add a 72nd
        # tensor to the 71 that published weights have.
        self.register_buffer('priors_cxcy', self.create_prior_boxes(), persistent=False)

    def forward(self, images):
        """images (N, 3, 300, 300) → locs (N, 8732, 4), offsets from the priors; scores
        (N, 8732, n_classes), before softmax. Raises ValueError for images of another shape."""
        if images.shape[1:] != (3, 300, 300):
            raise ValueError(f'images must be of shape (N, 3, 300, 300), not {tuple(images.shape)}')
        conv4_3, conv7 = self.base(images)  # (N, 512, 38, 38), (N, 1024, 19, 19)
        # In float32, even under autocast: a sum of 512 squares needs it. normalize() never divides by 0.
        rescaled = F.normalize(conv4_3.float(), dim=1) * self.rescale_factors  # (N, 512, 38, 38)
        return self.pred_convs(rescaled, conv7, *self.aux_convs(conv7))

    @staticmethod
    def create_prior_boxes():
        """The 8732 priors in fractional center-size coordinates (8732, 4) (paper, section 2.2): map by
        map, row by row, position by position; at each position the ratio 1, the extra prior, then the
        other ratios."""
        priors = []
        for i, (_, _, grid, scale, ratios) in enumerate(FEATURE_MAPS):
            # The extra prior is a square between this scale and the next. The last map has no next one:
            # the tutorial's code, and so its published weights, take 1.0 there.
            extra = sqrt(scale * FEATURE_MAPS[i + 1].scale) if i + 1 < len(FEATURE_MAPS) else 1.0
            # A prior of scale s and ratio a is s·√a wide and s/√a high: its area is s² whatever its ratio.
            sizes = [(scale, scale), (extra, extra),
                     *((scale * sqrt(ratio), scale / sqrt(ratio)) for ratio in ratios[1:])]
            for row in range(grid):
                for column in range(grid):
                    c_x, c_y = (column + 0.5) / grid, (row + 0.5) / grid  # the middle of the tile
                    priors += [(c_x, c_y, w, h) for w, h in sizes]
        priors = torch.tensor(priors)  # (8732, 4)
        # No prior is wider or higher than the image: as in the tutorial's code, this cuts 20 of them, on the
        # two uppermost maps. 2740 overshoot an edge of the image and stay so, as in the Caffe code.
        priors[:, 2:].clamp_(max=1)
        return priors

    def decode(self, predicted_locs, predicted_scores):
        """The network's output (N, 8732, 4), (N, 8732, n_classes) → boxes in fractional boundary coordinates
        (N, 8732, 4), probabilities of the classes (N, 8732, n_classes)."""
        boxes = cxcy_to_xy(gcxgcy_to_cxcy(predicted_locs.float(), self.priors_cxcy))  # (N, 8732, 4)
        if self.clip_boxes:
            boxes = boxes.clamp(0, 1)
        return boxes, predicted_scores.float().softmax(dim=2)

    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap, top_k):
        """Turns the network's output into objects.

        :param predicted_locs: (N, 8732, 4)
        :param predicted_scores: (N, 8732, n_classes), before softmax
        :param min_score: only candidates with a greater score count
        :param max_overlap: two boxes of one class that overlap by more than this are one object
        :param top_k: at most this many objects per image, the best ones
        :return: three lists with a tensor per image, by falling score: boxes in fractional boundary
            coordinates (n, 4), labels (n), scores (n); n may be 0
        """
        boxes, probabilities = self.decode(predicted_locs, predicted_scores)
        detections = [suppress_duplicates(image_boxes, class_scores, min_score, max_overlap, top_k)
                      for image_boxes, class_scores in zip(boxes, probabilities[:, :, 1:])]
        return tuple([detection[i] for detection in detections] for i in range(3))


# --------------------------------------------------------------------------------------------- loss

class MultiBoxLoss(nn.Module):
    """The loss of SSD: of the boxes (localization) and of the classes (confidence), paper, section 2.2."""

    def __init__(self, priors_cxcy, threshold=0.5, neg_pos_ratio=3, alpha=1.0, localization='smooth_l1'):
        """
        :param priors_cxcy: priors in center-size coordinates (8732, 4)
        :param threshold: a prior is positive if it overlaps at least so much with an object
        :param neg_pos_ratio: hard negatives per positive prior
        :param alpha: weight of the localization loss
        :param localization: 'smooth_l1' as in the paper, or 'l1', with which the tutorial's published
            weights were trained by mistake
        """
        super().__init__()
        if localization not in ('smooth_l1', 'l1'):
            raise ValueError(f"localization must be 'smooth_l1' or 'l1', not {localization!r}")
        self.threshold, self.neg_pos_ratio, self.alpha = threshold, neg_pos_ratio, alpha
        self.localization_loss = F.smooth_l1_loss if localization == 'smooth_l1' else F.l1_loss
        self.register_buffer('priors_cxcy', priors_cxcy, persistent=False)
        self.register_buffer('priors_xy', cxcy_to_xy(priors_cxcy), persistent=False)

    def forward(self, predicted_locs, predicted_scores, boxes, labels):
        """
        :param predicted_locs: (N, 8732, 4), offsets from the priors
        :param predicted_scores: (N, 8732, n_classes), before softmax
        :param boxes: list of N tensors: objects in fractional boundary coordinates (n_objects, 4), or (0, 4)
        :param labels: list of N tensors: their classes (n_objects)
        :return: the loss, a scalar; 0 without any object in the batch. Its parts, confidence and
            localization, are left in `self.parts` (2), without gradient.
        """
        predicted_locs, predicted_scores = predicted_locs.float(), predicted_scores.float()  # after autocast
        true_boxes, true_classes = self.match(boxes, labels)  # (N, 8732, 4), (N, 8732)
        positive = true_classes > 0  # (N, 8732)
        n_positives = positive.sum(dim=1)  # (N)
        n_positives_in_batch = mean_over_processes(n_positives.sum())

        # Localization: positive priors only, since there is no right box around nothing. The paper adds up
        # the four offsets of a box. This is their mean, a quarter of that, as for the published weights.
        true_locs = cxcy_to_gcxgcy(xy_to_cxcy(true_boxes), self.priors_cxcy)  # (N, 8732, 4)
        loc_loss = self.localization_loss(predicted_locs, true_locs, reduction='none').sum(dim=2)  # (N, 8732)
        loc_loss = torch.where(positive, loc_loss, 0).sum() / (4 * n_positives_in_batch)

        # Confidence: positive priors and, in each image, three times as many negative ones. With all the
        # thousands of them, answering "background" everywhere would cost almost nothing. There is most to
        # learn from the hardest ones, those with the highest loss.
        conf_loss = F.cross_entropy(predicted_scores.flatten(0, 1), true_classes.flatten(), reduction='none')
        conf_loss = conf_loss.view(positive.shape)  # (N, 8732)
        negative_losses = torch.where(positive, 0, conf_loss).sort(dim=1, descending=True).values  # (N, 8732)
        rank = torch.arange(negative_losses.shape[1], device=negative_losses.device)  # (8732)
        hard = rank < self.neg_pos_ratio * n_positives[:, None]  # (N, 8732)
        conf_loss = (torch.where(positive, conf_loss, 0).sum()
                     + torch.where(hard, negative_losses, 0).sum()) / n_positives_in_batch

        self.parts = torch.stack((conf_loss, loc_loss)).detach()
        return conf_loss + self.alpha * loc_loss

    @torch.no_grad()
    def match(self, boxes, labels):
        """Assigns an object or the background to each prior, for all images at once.

        :return: the boxes of the priors' objects (N, 8732, 4) in fractional boundary coordinates, the
            prior itself where it has none; the classes (N, 8732), background 0
        """
        # The images' objects side by side. Shorter lists are filled up with objects of class 0, which are
        # none, and every list gets one of these: without any object there is still something to choose from.
        object_boxes = F.pad(pad_sequence(boxes, batch_first=True), (0, 0, 0, 1))  # (N, max_objects, 4)
        object_classes = F.pad(pad_sequence(labels, batch_first=True), (0, 1))  # (N, max_objects)
        is_object = object_classes > 0  # (N, max_objects)

        # 1. The Jaccard overlap of each object with each prior.
        overlap = find_jaccard_overlap(object_boxes, self.priors_xy)  # (N, max_objects, 8732)

        # 2. Each prior's match is the object that it overlaps most.
        overlap_for_each_prior, object_for_each_prior = overlap.max(dim=1)  # (N, 8732)

        # 5. Each object claims the prior that it overlaps most, even below the threshold: otherwise it might
        #    be left without any prior. If two objects claim the same prior, the later one in the list gets
        #    it. (This rule comes before 3 and 4, since it overrides them.)
        prior_for_each_object = overlap.argmax(dim=2)  # (N, max_objects)
        number = torch.arange(object_classes.shape[1], device=overlap.device)  # (max_objects)
        claimed_by = torch.full_like(object_for_each_prior, -1)  # (N, 8732)
        claimed_by.scatter_reduce_(1, prior_for_each_object, torch.where(is_object, number, -1), 'amax')
        claimed = claimed_by >= 0  # (N, 8732)
        object_for_each_prior = torch.where(claimed, claimed_by, object_for_each_prior)

        # 3. and 4. Below the threshold a prior is negative: its class is the background. Otherwise it is
        #           positive, with the class and the box of its object.
        positive = claimed | (overlap_for_each_prior >= self.threshold)  # (N, 8732)
        true_classes = torch.where(positive, object_classes.gather(1, object_for_each_prior), 0)  # (N, 8732)
        box_numbers = object_for_each_prior[:, :, None].expand(-1, -1, 4)  # (N, 8732, 4)
        true_boxes = torch.where(positive[:, :, None], object_boxes.gather(1, box_numbers), self.priors_xy)
        return true_boxes, true_classes


def mean_over_processes(count):
    """A count of positives, averaged over the training processes, each of which has a part of the batch. All
    together count as at least 1: without objects the loss must be 0, not 0 / 0."""
    if not several_processes():
        return count.clamp(min=1)
    distributed.all_reduce(count)  # adds up those of all processes
    # The mean, since DistributedDataParallel takes the mean of the gradients, too.
    return count.clamp(min=1) / distributed.get_world_size()


# ---------------------------------------------------------------------------------------- detection

def suppress_duplicates(boxes, class_scores, min_score, max_overlap, top_k):
    """Non-maximum suppression for one image: boxes (8732, 4) in boundary coordinates, class_scores
    (8732, n_classes − 1) without the background's. Otherwise like `detect_objects`."""
    # Each pair of prior and class above min_score is a candidate: one prior may find several classes.
    priors, labels = (class_scores > min_score).nonzero(as_tuple=True)  # (n_candidates)
    scores, labels = class_scores[priors, labels], labels + 1  # (n_candidates): labels count from 1

    # batched_nms keeps classes apart by shifting each to a place of its own. In float32, that would cost
    # coordinates their last digits; and the shift is far enough only if no coordinate is negative.
    shifted = boxes.double() - boxes.min().double()  # (8732, 4)

    # Whether a candidate stays depends only on those with higher scores. So the best 2000 are enough if
    # top_k of them stay. Early in training there are 90,000 candidates.
    n = 2000
    while True:
        lowest = scores.topk(n).values[-1] if n < len(scores) else min_score
        best, = (scores >= lowest).nonzero(as_tuple=True)  # (n_best): all that equal the n-th are among them
        best = best[scores[best].argsort(descending=True, stable=True)]  # far quicker than sorting everything
        kept = batched_nms(shifted[priors[best]], scores[best].double(), labels[best], max_overlap)
        if len(kept) >= top_k or len(best) == len(scores):
            kept = best[kept.sort().values[:top_k]]  # by falling score, since that is the order of `best`
            return boxes[priors[kept]], labels[kept], scores[kept]
        n *= 2


# ------------------------------------------------------------------------------ weights from elsewhere

def load_model(checkpoint_path) -> tuple[SSD300, dict[str, int]]:
    """The network of a checkpoint, on the CPU and ready for detection, and its label map. Checkpoints are
    files of train.py, of the tutorial's original code, or of one of the `PEERS`; 'coco' downloads
    torchvision's SSD300, trained on COCO (136 MB, once). Raises InputError if it can't be used."""
    checkpoint = load_any_checkpoint(checkpoint_path)
    model = SSD300(n_classes=len(checkpoint['label_map']))
    load_weights(model, checkpoint, checkpoint_path)
    return model.eval(), checkpoint['label_map']


def load_weights(model, checkpoint, checkpoint_path):
    """Puts a loaded checkpoint into a network: its weights, and whatever else the network needs. Raises
    InputError if the weights don't fit."""
    try:
        model.load_state_dict(checkpoint['model'])
    except (RuntimeError, AttributeError, TypeError):
        raise InputError(f"checkpoint '{checkpoint_path}' doesn't hold the weights of an SSD300 with "
                         f'{model.n_classes} classes: name one that train.py wrote') from None
    if 'priors_cxcy' in checkpoint:  # older checkpoints lack this part: a new network's values suit them
        model.priors_cxcy.copy_(checkpoint['priors_cxcy'])
        for name in ('image_mean', 'image_std', 'clip_boxes'):
            setattr(model, name, checkpoint[name])


def start_from_checkpoint(model, checkpoint_path, label_map):
    """Fine-tuning: puts a checkpoint's weights into a new network, those of the class heads only if the
    classes are the same. Raises InputError if the checkpoint can't be used."""
    checkpoint = load_any_checkpoint(checkpoint_path)
    print(f'Fine-tuning {checkpoint_path}')
    if checkpoint['label_map'] != label_map:
        print('Its classes are others: the class heads start anew')
        checkpoint['model'].update({name: weights for name, weights in model.state_dict().items()
                                    if name.startswith('pred_convs.cl_')})
    load_weights(model, checkpoint, checkpoint_path)


def download_weights(source, instead) -> dict:
    """The state dict of some of torchvision's pretrained weights, downloaded once. Raises InputError, which
    names what to do instead, if that fails."""
    try:
        return source.get_state_dict(progress=True, check_hash=True, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{source.url} can't be downloaded ({error}): {instead}, or put that file into "
                         f'{torch.hub.get_dir()}/checkpoints') from None


class Peer(NamedTuple):
    """Another implementation of the very same 71 tensors, with its layers in our order: how its names begin,
    and what it does differently. The defaults are those of the authors' Caffe code."""
    convs: tuple[str, ...]  # the layers conv1_1 … conv11_2
    rescale_factors: str
    loc: str  # the six localization convolutions
    cl: str  # the six class convolutions
    scales: tuple[float, ...] = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)  # of the priors, and the next one
    clip_centers: bool = True  # whether the centers of priors are kept inside the image
    image_mean: tuple[float, ...] = (123 / 255, 117 / 255, 104 / 255)  # there, images go from 0 to 255
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
    """A checkpoint of ours, or weights of one of the peers in the same form; see `load_model`."""
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
    raise InputError(f"'{path}' holds no weights that are known here: name a checkpoint of train.py or of the "
                     f"original tutorial, or weights of {', '.join(PEERS)}")


def from_peer(state_dict, name) -> dict:
    """Weights of one of the `PEERS` as a checkpoint of ours, which predicts the same. Raises InputError for
    those of another network than SSD300, or for other classes than VOC's or COCO's."""
    peer = PEERS[name]

    def tensors(beginning):  # of each layer its weight, then its bias
        return [tensor for key, tensor in state_dict.items() if key.startswith(beginning)]

    with torch.device('meta'):  # its weights aren't needed, only their names
        own_names = [key for key in SSD300(n_classes=1).state_dict() if key.startswith(('base.', 'aux_convs.'))]
    convs, locs, scores = tensors(peer.convs), tensors(peer.loc), tensors(peer.cl)
    n_classes = len(scores[-1]) // FEATURE_MAPS[-1].n_priors if scores else 0
    coco_labels = SSD300_VGG16_Weights.COCO_V1.meta['categories'][1:]
    labels = {21: voc_labels, 91: [f'{label} {i}' if label == 'N/A' else label  # numbers without a class
                                   for i, label in enumerate(coco_labels, 1)]}
    require(len(convs) == len(own_names) and n_classes in labels,
            f"these weights of {name} aren't those of its SSD300 for VOC's 21 or COCO's 91 classes: name other ones")

    weights = dict(zip(own_names, convs))
    weights['rescale_factors'] = state_dict[peer.rescale_factors].view(1, 512, 1, 1)
    for kind, heads in (('loc', locs), ('cl', scores)):
        parts = [(feature_map, part) for feature_map in FEATURE_MAPS for part in ('weight', 'bias')]
        for (feature_map, part), tensor in zip(parts, heads):
            # At each position, their priors come in the order 1, extra, 2, 1/2, 3, 1/3.
            order = [0, 1, 2, 4, 3, 5] if feature_map.n_priors == 6 else [0, 1, 2, 3]  # our i-th is their order[i]-th
            channels = tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)
            weights[f'pred_convs.{kind}_{feature_map.name}.{part}'] = channels
    return {'epoch': 0, 'model': weights, 'label_map': make_label_map(labels[n_classes]), 'settings': {},
            'priors_cxcy': caffe_priors(peer.scales, peer.clip_centers), 'clip_boxes': peer.clip_boxes,
            'image_mean': list(peer.image_mean), 'image_std': list(peer.image_std)}


def caffe_priors(scales, clip_centers):
    """The priors of those who follow the authors' Caffe code, in our order, center-size (8732, 4): of other
    scales than ours, and with centers in steps of whole pixels. On conv8_2's map, 19 of these lie 4 pixels
    beyond the image: some keep them inside, torchvision doesn't."""
    priors = []
    for i, (step, feature_map) in enumerate(zip((8, 16, 32, 64, 100, 300), FEATURE_MAPS)):
        scale, extra = scales[i], sqrt(scales[i] * scales[i + 1])
        ratios = [1 / 3 if ratio == 0.333 else ratio for ratio in feature_map.ratios[1:]]
        sizes = [(scale, scale), (extra, extra), *((scale * sqrt(ratio), scale / sqrt(ratio)) for ratio in ratios)]
        centers = [(place + 0.5) * step / IMAGE_SIZE for place in range(feature_map.grid)]
        priors += [(c_x, c_y, w, h) for c_y in centers for c_x in centers for w, h in sizes]
    priors = torch.tensor(priors)  # (8732, 4)
    priors[:, 0 if clip_centers else 2:].clamp_(max=1)
    return priors
