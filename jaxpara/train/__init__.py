"""Training, pure: a loss, an optimiser, a step and its state. No files, no printing."""

from jaxpara.train.loss import evaluate as evaluate
from jaxpara.train.loss import next_token_loss as next_token_loss
from jaxpara.train.optimizer import decay_mask as decay_mask
from jaxpara.train.optimizer import optimizer as optimizer
from jaxpara.train.optimizer import schedule as schedule
from jaxpara.train.step import init_state as init_state
from jaxpara.train.step import make_step as make_step
