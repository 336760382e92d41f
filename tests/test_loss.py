"""The loss: matching, hard negatives and the two parts, against the plain reference and by hand."""

import math

import pytest
import torch
from conftest import random_boxes
from references import match, multibox_loss
from torch import distributed, multiprocessing

from model import MultiBoxLoss
from utils import cxcy_to_xy, xy_to_cxcy

pytestmark = pytest.mark.usefixtures('one_thread')

REFERENCES = {'smooth_l1': {}, 'l1': {'localization': abs}}  # the reference's own default is smooth L1


def random_case(seed, n_priors=40, n_classes=4, grid=None, counts=None):
    """Priors, predicted locs and scores, boxes, labels; `counts` are the numbers of objects in the images."""
    generator = torch.Generator().manual_seed(seed)
    if counts is None:
        counts = torch.randint(0, 6, (1 + seed % 4,), generator=generator).tolist()
    priors = xy_to_cxcy(random_boxes(n_priors, seed=seed, grid=grid))
    locs = 3 * torch.randn(len(counts), n_priors, 4, generator=generator)
    scores = 2 * torch.randn(len(counts), n_priors, n_classes, generator=generator)
    boxes = [random_boxes(count, seed=1000 + 10 * seed + i, grid=grid) for i, count in enumerate(counts)]
    labels = [torch.randint(1, n_classes, (count,), generator=generator) for count in counts]
    return priors, locs, scores, boxes, labels


def as_lists(*arguments):
    return [[tensor.tolist() for tensor in argument] for argument in arguments]


def check(case, localization, **settings):
    priors, *arguments = case
    criterion = MultiBoxLoss(priors, localization=localization, **settings)
    loss = criterion(*arguments)
    parts = [part.item() for part in criterion.parts(*arguments)]
    alpha = settings.pop('alpha', 1.0)
    expected = multibox_loss(priors.tolist(), *as_lists(*arguments), **REFERENCES[localization], **settings)
    assert parts == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert loss.item() == pytest.approx(expected[0] + alpha * expected[1], rel=1e-4, abs=1e-6)


# ----------------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize('grid', [None, 8, 16])
def test_matching_agrees_with_its_definition(grid):
    for seed in range(100):
        priors, _, _, boxes, labels = random_case(seed, grid=grid)
        criterion = MultiBoxLoss(priors)
        for image_boxes, image_labels in zip(boxes, labels):
            true_boxes, true_classes = criterion.match(image_boxes, image_labels)
            assert true_boxes.shape == (40, 4) and true_classes.shape == (40,)
            objects = match(cxcy_to_xy(priors).tolist(), image_boxes.tolist(), threshold=0.5)
            assert true_classes.tolist() == [0 if j is None else image_labels[j].item() for j in objects]
            for i, j in enumerate(objects):
                assert j is None or torch.equal(true_boxes[i], image_boxes[j])


# Four priors, quarters of the image, and one in its middle.
QUARTERS = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.25, 0.75, 0.5, 0.5],
                         [0.75, 0.75, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])


WHOLE, TINY = [0, 0, 0.5, 0.5], [0.1, 0.1, 0.3, 0.3]  # the first quarter, and 0.04 of its 0.25


@pytest.mark.parametrize(('boxes', 'expected'), [
    ([TINY], [1, 0, 0, 0, 0]),  # an object below the threshold still gets its best prior
    ([WHOLE, TINY], [2, 0, 0, 0, 0]), ([TINY, WHOLE], [2, 0, 0, 0, 0]),  # of two with the same, the later has it
    # A claimed prior is taken from an object that it overlaps more. The small one doesn't reach the threshold.
    ([[0, 0, 0.5, 0.45], [0.2, 0.2, 0.4, 0.4]], [2, 0, 0, 0, 0]),
    ([[0, 0, 0.5, 1]], [1, 0, 1, 0, 0])])  # an overlap of exactly the threshold, with two quarters, is positive
def test_matching_worked_out_on_paper(boxes, expected):
    criterion, boxes = MultiBoxLoss(QUARTERS), torch.tensor(boxes)
    true_boxes, true_classes = criterion.match(boxes, torch.tensor([1, 2])[:len(boxes)])
    assert true_classes.tolist() == expected
    for i, number in enumerate(expected):
        assert torch.equal(true_boxes[i], boxes[number - 1] if number else criterion.priors_xy[i])
    # An object that meets no prior gets any.
    assert criterion.match(torch.tensor([[2.0, 2, 3, 3]]), torch.tensor([7]))[1].sum() == 7


# --------------------------------------------------------------------------------------------------- loss

@pytest.mark.parametrize('grid', [None, 16])
@pytest.mark.parametrize('localization', ['smooth_l1', 'l1'])
def test_the_loss_and_its_parts_agree_with_their_definition(localization, grid):
    for seed in range(60):
        check(random_case(seed, grid=grid), localization)


def test_threshold_ratio_and_alpha_do_what_they_say():
    for seed in range(30):
        check(random_case(seed), 'smooth_l1', threshold=0.3, neg_pos_ratio=1, alpha=2.5)
        check(random_case(seed), 'l1', threshold=0.7, neg_pos_ratio=7, alpha=0.0)


@pytest.mark.parametrize('localization', ['smooth_l1', 'l1'])
def test_the_loss_with_the_real_priors_agrees_with_its_definition(model, localization):
    check((model.priors_cxcy, *random_case(0, n_priors=8732, n_classes=21, counts=[3, 0, 1])[1:]), localization)


def test_the_loss_worked_out_on_paper():
    # One object on the first quarter; scores of 0 cost log 2 everywhere: one positive, three hard negatives.
    criterion = MultiBoxLoss(QUARTERS)  # smooth L1 is the default
    locs = torch.zeros(1, 5, 4)
    locs[0, 0] = torch.tensor([3, -0.5, 0, 0])  # smooth L1: 2.5, 0.125, 0, 0
    arguments = locs, torch.zeros(1, 5, 2), [torch.tensor([[0, 0, 0.5, 0.5]])], [torch.tensor([1])]
    assert [part.item() for part in criterion.parts(*arguments)] == pytest.approx([4 * math.log(2), 2.625 / 4])
    assert criterion(*arguments).item() == pytest.approx(4 * math.log(2) + 2.625 / 4)
    with pytest.raises(ValueError, match="'smooth_l1' or 'l1'"):
        MultiBoxLoss(QUARTERS, localization='L1')


@pytest.mark.parametrize('counts', [[0, 0], []])
@pytest.mark.parametrize('localization', ['smooth_l1', 'l1'])
def test_a_batch_without_any_object_or_image_has_loss_0_and_gradient_0(localization, counts):
    priors, locs, scores, boxes, labels = random_case(4, counts=counts)
    arguments = locs.requires_grad_(), scores.requires_grad_(), boxes, labels
    criterion = MultiBoxLoss(priors, localization=localization)
    loss = criterion(*arguments)
    loss.backward()
    assert loss == 0
    assert all(part == 0 for part in criterion.parts(*arguments))
    assert locs.grad.eq(0).all()
    assert scores.grad.eq(0).all()


def test_with_min_negatives_an_image_without_objects_teaches_from_its_hardest_priors():
    priors, locs, scores, boxes, labels = random_case(4, counts=[0, 2])
    for images in (slice(0, 1), slice(0, 2)):  # alone in the batch, too
        taught = []
        for min_negatives in (0, 3):
            ours = scores[images].clone().requires_grad_()
            criterion = MultiBoxLoss(priors, min_negatives=min_negatives)
            criterion(locs[images], ours, boxes[images], labels[images]).backward()
            taught.append(ours.grad[0].ne(0).any(dim=1))  # (n_priors)
        assert taught[0].sum() == 0
        losses = -scores[0].log_softmax(dim=1)[:, 0]  # of the background
        assert taught[1].nonzero()[:, 0].tolist() == sorted(losses.topk(3).indices.tolist())
    # Three per positive prior are more: nothing changes for the other image.
    other = [MultiBoxLoss(priors, min_negatives=n)(locs[1:], scores[1:], boxes[1:], labels[1:]) for n in (0, 3)]
    assert torch.equal(*other)


@pytest.mark.parametrize('localization', ['smooth_l1', 'l1'])
def test_the_gradient_is_the_slope_of_the_definition(localization):
    priors, locs, scores, boxes, labels = random_case(5, n_priors=15, n_classes=3, counts=[2, 1])
    MultiBoxLoss(priors, localization=localization)(locs.requires_grad_(), scores.requires_grad_(),
                                                    boxes, labels).backward()
    priors, (locs_list, scores_list, boxes, labels) = priors.tolist(), as_lists(locs, scores, boxes, labels)
    step = 1e-4
    for values, gradient in ((locs_list, locs.grad), (scores_list, scores.grad)):
        for i, j, k in torch.cartesian_prod(*map(torch.arange, gradient.shape)).tolist():
            losses, value = [], values[i][j][k]
            for changed in (value - step, value + step):
                values[i][j][k] = changed
                losses.append(sum(multibox_loss(priors, locs_list, scores_list, boxes, labels,
                                                **REFERENCES[localization])))
            values[i][j][k] = value
            assert gradient[i, j, k].item() == pytest.approx((losses[1] - losses[0]) / (2 * step), abs=1e-4)
        assert gradient.ne(0).any()


def test_both_parts_have_a_gradient_and_nothing_of_the_caller_is_changed():
    case, copies = (random_case(7, counts=[3, 0, 2]) for _ in range(2))
    criterion = MultiBoxLoss(case[0])
    confidence, localization = criterion.parts(case[1].requires_grad_(), case[2].requires_grad_(), *case[3:])
    confidence.backward()
    assert case[2].grad.ne(0).any() and case[1].grad is None
    localization.backward()
    assert case[1].grad.ne(0).any()
    for tensors, before in zip(case, copies):
        assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    low = [tensor.bfloat16() for tensor in case[1:3]]  # as under autocast: nothing is lost
    loss = criterion(*low, *case[3:])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, criterion(*(tensor.float() for tensor in low), *case[3:]))


# -------------------------------------------------------------------------------------- several processes

SHARED_BATCHES = {'objects in all shares': [3, 1, 2, 4], 'objects in one share alone': [3, 2, 0, 0],
                  'no objects': [0, 0, 0, 0]}


def gradients_of_a_share(case, images=slice(None)):
    priors, *rest = case
    locs, scores, boxes, labels = (argument[images] for argument in rest)
    MultiBoxLoss(priors)(locs.requires_grad_(), scores.requires_grad_(), boxes, labels).backward()
    return locs.grad, scores.grad


def one_of_two_processes(rank, folder):
    distributed.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    gradients = {name: gradients_of_a_share(random_case(9, counts=counts), slice(2 * rank, 2 * rank + 2))
                 for name, counts in SHARED_BATCHES.items()}
    torch.save(gradients, f'{folder}/gradients_{rank}.pth')
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_to_the_gradient_of_the_whole_batch(tmp_path):
    multiprocessing.spawn(one_of_two_processes, args=(tmp_path,), nprocs=2)
    halves = [torch.load(tmp_path / f'gradients_{rank}.pth') for rank in range(2)]
    for name, counts in SHARED_BATCHES.items():
        whole = gradients_of_a_share(random_case(9, counts=counts))
        for gradient, first, second in zip(whole, halves[0][name], halves[1][name], strict=True):
            torch.testing.assert_close(torch.cat((first, second)) / 2, gradient)
