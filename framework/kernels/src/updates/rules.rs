//! The update rules of optimizers, value by value, as PyTorch computes them. `cuda/optimizer.cu` implements
//! the same rules.

/// The maximum number of state values that a rule stores per parameter value.
pub const MOST_STATES: usize = 3;

/// How a step updates a parameter value and its optimizer state.
pub trait Rule: Copy + Send + Sync {
    /// The name of the rule's kernels.
    const NAME: &'static str;

    /// The number of the rule's hyperparameters.
    const NUMBERS: usize;

    /// The hyperparameters, in the order of the kernels' struct.
    fn numbers(&self) -> Vec<f32>;

    /// The new value of `w`, given its gradient. Updates the state `kept` in place; if a parameter lacks a
    /// state value, it is passed as 0 and discarded afterwards.
    fn step(&self, w: f32, gradient: f32, kept: &mut [f32; MOST_STATES]) -> f32;
}

/// A step of Adam (Kingma and Ba 2015, algorithm 1), AdamW (Loshchilov and Hutter 2019, algorithm 2), NAdam
/// (Dozat 2016) or RAdam (Liu et al. 2020, algorithm 2). Stores both moments and, with AMSGrad (Reddi et al.
/// 2018), the largest second moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// 1 - beta1, where beta1 is the decay of the first moment.
    pub one_minus_beta1: f32,
    /// The decay of the second moment.
    pub beta2: f32,
    /// 1 - beta2.
    pub one_minus_beta2: f32,
    /// Added to the square root of the second moment.
    pub eps: f32,
    /// Factor of the first moment in the numerator: the learning rate divided by the first moment's bias
    /// correction.
    pub of_moment: f32,
    /// Factor of the gradient in the numerator; 0 except for NAdam.
    pub of_gradient: f32,
    /// Square root of the second moment's bias correction; divides that moment's root. Infinite to leave the
    /// second moment out.
    pub root_correction: f32,
    /// L2 penalty factor: `l2` times the parameter is added to its gradient.
    pub l2: f32,
    /// Factor of the parameter itself: 1 without weight decay.
    pub keep: f32,
}

impl Rule for AdamStep {
    const NAME: &'static str = "adam";
    const NUMBERS: usize = 9;

    fn numbers(&self) -> Vec<f32> {
        let Self { one_minus_beta1, beta2, one_minus_beta2, eps, .. } = *self;
        let Self { of_moment, of_gradient, root_correction, l2, keep, .. } = *self;
        vec![one_minus_beta1, beta2, one_minus_beta2, eps, of_moment, of_gradient, root_correction, l2, keep]
    }

    #[inline(always)]
    fn step(&self, w: f32, gradient: f32, [m, v, largest]: &mut [f32; MOST_STATES]) -> f32 {
        let g = gradient + self.l2 * w;
        *m += (g - *m) * self.one_minus_beta1;
        *v = *v * self.beta2 + self.one_minus_beta2 * g * g;
        // Neither is below 0; NaN stays NaN.
        let second = if *largest > *v { *largest } else { *v };
        *largest = second;
        let moved = self.of_moment * *m + self.of_gradient * g;
        w * self.keep - moved / (second.sqrt() / self.root_correction + self.eps)
    }
}

/// A step of stochastic gradient descent. With momentum (Sutskever et al. 2013), stores the last update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdStep {
    /// The learning rate.
    pub lr: f32,
    /// Factor of the last update.
    pub momentum: f32,
    /// Factor of the gradient in the update; 1 without momentum.
    pub entering: f32,
    /// L2 penalty factor: `l2` times the parameter is added to its gradient.
    pub l2: f32,
    /// Whether to use Nesterov momentum.
    pub nesterov: bool,
}

impl Rule for SgdStep {
    const NAME: &'static str = "sgd";
    const NUMBERS: usize = 5;

    fn numbers(&self) -> Vec<f32> {
        let Self { lr, momentum, entering, l2, nesterov } = *self;
        vec![lr, momentum, entering, l2, f32::from(u8::from(nesterov))]
    }

    #[inline(always)]
    fn step(&self, w: f32, gradient: f32, [update, ..]: &mut [f32; MOST_STATES]) -> f32 {
        let g = gradient + self.l2 * w;
        *update = self.momentum * *update + self.entering * g;
        w - self.lr * if self.nesterov { g + self.momentum * *update } else { *update }
    }
}

/// A step of RMSprop (Hinton's lecture; the centred form of Graves 2013). Stores the mean square; with
/// momentum also the last update; if centred also the mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmspropStep {
    /// The learning rate.
    pub lr: f32,
    /// The decay of the means.
    pub alpha: f32,
    /// 1 - alpha.
    pub one_minus_alpha: f32,
    /// Added to the square root of the mean square.
    pub eps: f32,
    /// Factor of the last update.
    pub momentum: f32,
    /// L2 penalty factor: `l2` times the parameter is added to its gradient.
    pub l2: f32,
    /// Whether to divide by the standard deviation instead of the root mean square.
    pub centered: bool,
}

impl Rule for RmspropStep {
    const NAME: &'static str = "rmsprop";
    const NUMBERS: usize = 7;

    fn numbers(&self) -> Vec<f32> {
        let Self { lr, alpha, one_minus_alpha, eps, momentum, l2, centered } = *self;
        vec![lr, alpha, one_minus_alpha, eps, momentum, l2, f32::from(u8::from(centered))]
    }

    #[inline(always)]
    fn step(&self, w: f32, gradient: f32, [square, update, mean]: &mut [f32; MOST_STATES]) -> f32 {
        let g = gradient + self.l2 * w;
        *square = *square * self.alpha + self.one_minus_alpha * g * g;
        *mean += (g - *mean) * self.one_minus_alpha;
        let variance = if self.centered { *square - *mean * *mean } else { *square };
        *update = self.momentum * *update + g / (variance.sqrt() + self.eps);
        w - self.lr * *update
    }
}

/// A step of Adagrad (Duchi, Hazan and Singer 2011). Stores the sum of squares.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdagradStep {
    /// The learning rate.
    pub lr: f32,
    /// Added to the square root of the sum.
    pub eps: f32,
    /// L2 penalty factor: `l2` times the parameter is added to its gradient.
    pub l2: f32,
}

impl Rule for AdagradStep {
    const NAME: &'static str = "adagrad";
    const NUMBERS: usize = 3;

    fn numbers(&self) -> Vec<f32> {
        let Self { lr, eps, l2 } = *self;
        vec![lr, eps, l2]
    }

    #[inline(always)]
    fn step(&self, w: f32, gradient: f32, [sum, ..]: &mut [f32; MOST_STATES]) -> f32 {
        let g = gradient + self.l2 * w;
        *sum += g * g;
        w - self.lr * g / (sum.sqrt() + self.eps)
    }
}

/// A step of Adadelta (Zeiler 2012, algorithm 1). Stores the mean squares of gradients and of updates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdadeltaStep {
    /// The learning rate.
    pub lr: f32,
    /// The decay of both mean squares.
    pub rho: f32,
    /// 1 - rho.
    pub one_minus_rho: f32,
    /// Added to both mean squares.
    pub eps: f32,
    /// L2 penalty factor: `l2` times the parameter is added to its gradient.
    pub l2: f32,
}

impl Rule for AdadeltaStep {
    const NAME: &'static str = "adadelta";
    const NUMBERS: usize = 5;

    fn numbers(&self) -> Vec<f32> {
        let Self { lr, rho, one_minus_rho, eps, l2 } = *self;
        vec![lr, rho, one_minus_rho, eps, l2]
    }

    #[inline(always)]
    fn step(&self, w: f32, gradient: f32, [square, moved, _]: &mut [f32; MOST_STATES]) -> f32 {
        let g = gradient + self.l2 * w;
        *square = *square * self.rho + self.one_minus_rho * g * g;
        let update = g * ((*moved + self.eps).sqrt() / (*square + self.eps).sqrt());
        *moved = *moved * self.rho + self.one_minus_rho * update * update;
        w - self.lr * update
    }
}

/// A step of Adamax (Kingma and Ba 2015, section 7.1). Stores the first moment and the largest gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamaxStep {
    /// 1 - beta1, where beta1 is the decay of the first moment.
    pub one_minus_beta1: f32,
    /// The decay of the largest gradient.
    pub beta2: f32,
    /// Added to the gradient's absolute value.
    pub eps: f32,
    /// Factor of the first moment over the largest gradient: the learning rate divided by the moment's bias
    /// correction.
    pub of_moment: f32,
    /// L2 penalty factor: `l2` times the parameter is added to its gradient.
    pub l2: f32,
}

impl Rule for AdamaxStep {
    const NAME: &'static str = "adamax";
    const NUMBERS: usize = 5;

    fn numbers(&self) -> Vec<f32> {
        let Self { one_minus_beta1, beta2, eps, of_moment, l2 } = *self;
        vec![one_minus_beta1, beta2, eps, of_moment, l2]
    }

    #[inline(always)]
    fn step(&self, w: f32, gradient: f32, [m, largest, _]: &mut [f32; MOST_STATES]) -> f32 {
        let g = gradient + self.l2 * w;
        *m += (g - *m) * self.one_minus_beta1;
        let (before, size) = (*largest * self.beta2, g.abs() + self.eps);
        *largest = if before > size { before } else { size };
        w - self.of_moment * *m / *largest
    }
}
