//! In-place passes over tensors of equal shape.

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Tensor};

struct Zip2<F>(F);
struct Zip3<F>(F);

/// `f(x, a)` for every element x of `dst`.
pub(super) fn zip2(dst: &Tensor, a: &Tensor, f: impl Fn(&mut f32, f32) + Sync) -> Result<()> {
    dst.inplace_op2(a, &Zip2(f))
}

/// `f(x, a, b)` for every element x of `dst`.
pub(super) fn zip3(
    dst: &Tensor,
    a: &Tensor,
    b: &Tensor,
    f: impl Fn(&mut f32, f32, f32) + Sync,
) -> Result<()> {
    dst.inplace_op3(a, b, &Zip3(f))
}

impl<F: Fn(&mut f32, f32)> InplaceOp2 for Zip2<F> {
    fn name(&self) -> &'static str {
        "zip2"
    }
    fn cpu_fwd(&self, dst: &mut CpuStorage, _: &Layout, a: &CpuStorage, l: &Layout) -> Result<()> {
        let (CpuStorage::F32(dst), CpuStorage::F32(a)) = (dst, a) else { candle_core::bail!("zip2: f32") };
        dst.iter_mut().zip(&a[l.start_offset()..]).for_each(|(d, a)| (self.0)(d, *a));
        Ok(())
    }
}

impl<F: Fn(&mut f32, f32, f32)> InplaceOp3 for Zip3<F> {
    fn name(&self) -> &'static str {
        "zip3"
    }
    fn cpu_fwd(
        &self,
        dst: &mut CpuStorage,
        _: &Layout,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<()> {
        let (CpuStorage::F32(dst), CpuStorage::F32(a), CpuStorage::F32(b)) = (dst, a, b) else {
            candle_core::bail!("zip3: f32")
        };
        let ab = a[la.start_offset()..].iter().zip(&b[lb.start_offset()..]);
        dst.iter_mut().zip(ab).for_each(|(d, (a, b))| (self.0)(d, *a, *b));
        Ok(())
    }
}
