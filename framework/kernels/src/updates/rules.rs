//! The rules by which optimizers move parameters, value by value, as PyTorch computes them. `cuda/optimizer.cu` has the same.

/// As many numbers as a rule keeps of each value of a parameter, at most.
pub const MOST_STATES: usize = 3;

/// How a step moves a parameter's value, and what is kept of it for the next step.
pub trait Rule: Copy + Send + Sync {
    /// What its kernels are called.
    const NAME: &'static str;

    /// How many numbers it has.
    const NUMBERS: usize;

    /// These, in the order of the kernels' struct.
    fn numbers(&self) -> Vec<f32>;

    /// The value that follows `w`, given its gradient. What is kept of it becomes what is kept of the next one; where a parameter
    /// keeps no such number, it is 0, and what becomes of it is forgotten.
    fn step(&self, w: f32, gradient: f32, kept: &mut [f32; MOST_STATES]) -> f32;
}

/// A step of Adam (Kingma and Ba 2015, algorithm 1), AdamW (Loshchilov and Hutter 2019, algorithm 2), NAdam (Dozat 2016) or RAdam
/// (Liu et al. 2020, algorithm 2). Keeps both moments, and with AMSGrad (Reddi et al. 2018) the largest second one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// 1 less the decay of the first moment.
    pub one_minus_beta1: f32,
    /// The decay of the second moment.
    pub beta2: f32,
    /// 1 less that.
    pub one_minus_beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Times the first moment, over the root of the second: the learning rate over the first one's correction.
    pub of_moment: f32,
    /// Times the gradient, over the same: 0 but for NAdam.
    pub of_gradient: f32,
    /// The root of the second moment's correction, which divides that moment's root; infinite where it is left out.
    pub root_correction: f32,
    /// Times the parameter, added to its gradient.
    pub l2: f32,
    /// What decay leaves of the parameter itself.
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
        // Neither is below 0; what is not a number stays so.
        let second = if *largest > *v { *largest } else { *v };
        *largest = second;
        let moved = self.of_moment * *m + self.of_gradient * g;
        w * self.keep - moved / (second.sqrt() / self.root_correction + self.eps)
    }
}

/// A step of stochastic gradient descent. With momentum (Sutskever et al. 2013) keeps the last update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdStep {
    /// The learning rate.
    pub lr: f32,
    /// The share of the last update that goes on.
    pub momentum: f32,
    /// The share of the gradient that enters the update; 1 without momentum.
    pub entering: f32,
    /// Times the parameter, added to its gradient.
    pub l2: f32,
    /// Looks ahead along the momentum.
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

/// A step of RMSprop (Hinton's lecture; the centred form of Graves 2013). Keeps the mean square, with momentum the last update,
/// centred the mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmspropStep {
    /// The learning rate.
    pub lr: f32,
    /// The decay of the means.
    pub alpha: f32,
    /// 1 less that.
    pub one_minus_alpha: f32,
    /// Added to the root of the mean square.
    pub eps: f32,
    /// The share of the last update that goes on.
    pub momentum: f32,
    /// Times the parameter, added to its gradient.
    pub l2: f32,
    /// Divides by the standard deviation.
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

/// A step of Adagrad (Duchi, Hazan and Singer 2011). Keeps the sum of squares.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdagradStep {
    /// The learning rate.
    pub lr: f32,
    /// Added to the root of the sum.
    pub eps: f32,
    /// Times the parameter, added to its gradient.
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

/// A step of Adadelta (Zeiler 2012, algorithm 1). Keeps the mean squares of gradients and of updates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdadeltaStep {
    /// The learning rate.
    pub lr: f32,
    /// The decay of both mean squares.
    pub rho: f32,
    /// 1 less that.
    pub one_minus_rho: f32,
    /// Added to both mean squares.
    pub eps: f32,
    /// Times the parameter, added to its gradient.
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

/// A step of Adamax (Kingma and Ba 2015, section 7.1). Keeps the first moment and the largest gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamaxStep {
    /// 1 less the decay of the first moment.
    pub one_minus_beta1: f32,
    /// The decay of the largest gradient.
    pub beta2: f32,
    /// Added to a gradient's size.
    pub eps: f32,
    /// Times the moment, over the largest gradient: the learning rate over the moment's correction.
    pub of_moment: f32,
    /// Times the parameter, added to its gradient.
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
