//! Pictures on their way to the callbacks: copied from the device, drawn and encoded while training goes on.

use std::collections::VecDeque;
use std::thread::{Builder, JoinHandle};

use candle_core::Tensor;
use candlepower_kernels::Download;

use super::{Trainer, phase};
use crate::callback::Picture;
use crate::data::Split;
use crate::error::{Error, Result};
use crate::module::{Draw, Sketch};

/// Maximum number of pending pictures. Training waits if more are requested than can be drawn.
const MOST: usize = 8;

/// Pictures that were requested but not shown yet, in the order of the requests.
#[derive(Default)]
pub(super) struct Gallery {
    coming: VecDeque<Coming>,
}

/// A pending picture.
struct Coming {
    step: u64,
    split: Split,
    name: String,
    stage: Stage,
}

/// The stage of a pending picture.
enum Stage {
    /// Its tensors are being copied to the host.
    Copying { of: Vec<Download>, draw: Draw },
    /// A thread draws it. That thread does not use the device, because only the training thread may.
    Drawing(JoinHandle<Result<Picture>>),
    /// Drawing it failed.
    Failed(Error),
}

impl Gallery {
    /// Adds a picture of the tensors' current values, for a step and a split.
    pub(super) fn add(&mut self, step: u64, split: Split, sketch: Sketch) -> Result<()> {
        let Sketch { name, of, draw } = sketch;
        let of = of.iter().map(Download::start).collect::<candle_core::Result<_>>()?;
        self.coming.push_back(Coming { step, split, name, stage: Stage::Copying { of, draw } });
        Ok(())
    }

    /// The next picture, if it is ready; waits only if too many are pending.
    pub(super) fn next_ready(&mut self) -> Option<Result<Picture>> {
        self.draw(|of| of.iter().all(|download| download.is_done().unwrap_or(true)));
        let is_next = self.coming.len() > MOST || self.coming.front().is_some_and(Coming::is_over);
        if is_next { self.next() } else { None }
    }

    /// The next picture; waits for it.
    pub(super) fn next(&mut self) -> Option<Result<Picture>> {
        if self.coming.is_empty() {
            return None;
        }
        let _phase = phase!("pictures");
        // Start drawing all of them, rather than one after the other.
        self.draw(|_| true);
        self.coming.pop_front().map(Coming::finish)
    }

    /// Passes the tensors that have been copied, or that are `wanted` in any case, to threads that draw.
    fn draw(&mut self, wanted: impl Fn(&[Download]) -> bool) {
        let draw = |it: Coming| match &it.stage {
            Stage::Copying { of, .. } if wanted(of) => it.draw(),
            _ => it,
        };
        self.coming = std::mem::take(&mut self.coming).into_iter().map(draw).collect();
    }
}

impl Trainer {
    /// Adds the pictures that a module wants drawn, if there are callbacks to show them to.
    pub(super) fn take_pictures(&mut self, step: u64, split: Split, pictures: Vec<Sketch>) -> Result<()> {
        if self.callbacks.is_empty() {
            return Ok(());
        }
        pictures.into_iter().try_for_each(|picture| self.gallery.add(step, split, picture))
    }

    /// Shows the pictures that are ready.
    pub(super) fn show_ready_pictures(&mut self) -> Result<()> {
        while let Some(picture) = self.gallery.next_ready() {
            self.show(&picture?)?;
        }
        Ok(())
    }

    /// Shows all pictures, waiting for each.
    pub(super) fn show_all_pictures(&mut self) -> Result<()> {
        while let Some(picture) = self.gallery.next() {
            self.show(&picture?)?;
        }
        Ok(())
    }

    /// Shows the remaining pictures after an error, because they may show its cause. Ignores further errors:
    /// the first one is the one to report.
    pub(super) fn show_what_is_left(&mut self) {
        while let Some(picture) = self.gallery.next() {
            let _ = picture.and_then(|picture| self.show(&picture));
        }
    }

    fn show(&mut self, picture: &Picture) -> Result<()> {
        self.callbacks.tell(|callback| callback.on_picture(picture))
    }
}

impl Coming {
    fn draw(self) -> Self {
        let Self { step, split, name, stage } = self;
        let stage = match stage {
            Stage::Copying { of, draw } => {
                Self::drawing(step, split, name.clone(), of, draw).map_or_else(Stage::Failed, Stage::Drawing)
            }
            later => later,
        };
        Self { step, split, name, stage }
    }

    fn drawing(
        step: u64,
        split: Split,
        name: String,
        of: Vec<Download>,
        draw: Draw,
    ) -> Result<JoinHandle<Result<Picture>>> {
        let of: Vec<Tensor> = of.into_iter().map(Download::finish).collect::<candle_core::Result<_>>()?;
        let work = move || Picture::new(step, split, &name, &draw(&of)?);
        Builder::new()
            .name("picture".into())
            .spawn(work)
            .map_err(|error| Error::msg(format!("there is no thread to draw it: {error}")))
    }

    fn is_over(&self) -> bool {
        match &self.stage {
            Stage::Copying { .. } => false,
            Stage::Drawing(drawing) => drawing.is_finished(),
            Stage::Failed(_) => true,
        }
    }

    /// Waits for the thread that draws the picture.
    fn finish(self) -> Result<Picture> {
        let picture = match self.stage {
            Stage::Drawing(drawing) => {
                drawing.join().unwrap_or_else(|_| Err(Error::msg("drawing it failed; the message is above")))
            }
            Stage::Failed(error) => Err(error),
            Stage::Copying { .. } => Err(Error::msg("nobody draws it")),
        };
        picture.map_err(|error| Error::msg(format!("picture `{}`: {error}", self.name)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::sync::{Arc, Mutex};

    use candle_core::{Device, Var};
    use candlepower_kernels::updates::approach;

    use super::*;

    fn sketch(
        name: &str,
        of: &Tensor,
        draw: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Sketch {
        Sketch { name: name.into(), of: vec![of.clone()], draw: Arc::new(draw) }
    }

    fn all(gallery: &mut Gallery) -> Vec<Result<Picture>> {
        std::iter::from_fn(|| gallery.next()).collect()
    }

    #[test]
    fn pictures_come_in_order_while_others_are_drawn_and_of_the_values_they_were_asked_for() {
        let pixels = Var::new(&[[[0.25f32, 0.75]]], &Device::Cpu).unwrap();
        let mut gallery = Gallery::default();
        // The first picture waits for a message.
        let (tell, told) = mpsc::channel::<()>();
        let told = Mutex::new(told);
        let slow = move |x: &[Tensor]| {
            told.lock().unwrap().recv().unwrap();
            Ok(x[0].clone())
        };
        gallery.add(7, Split::Train, sketch("slow", &pixels, slow)).unwrap();
        gallery.add(7, Split::Val, sketch("quick", &pixels, |x| Ok(x[0].clone()))).unwrap();
        approach(&[(&pixels, &pixels.zeros_like().unwrap())], 1.).unwrap();
        assert!(gallery.next_ready().is_none(), "the first is not drawn, and the second comes after it");
        tell.send(()).unwrap();
        let pictures: Vec<Picture> = all(&mut gallery).into_iter().map(Result::unwrap).collect();
        assert_eq!([&pictures[0].name, &pictures[1].name], ["slow", "quick"]);
        assert_eq!((pictures[1].step, pictures[1].split), (7, Split::Val));
        assert_eq!(pictures[0].pixels.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.25, 0.75]);
        let png = image::load_from_memory(&pictures[0].png).unwrap().to_rgb8();
        assert_eq!((png.dimensions(), png.get_pixel(1, 0).0), ((2, 1), [191; 3]));
        assert!(gallery.next_ready().is_none() && gallery.next().is_none());
    }

    #[test]
    fn only_so_many_are_on_their_way() {
        let pixels = Tensor::zeros((1, 1, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let mut gallery = Gallery::default();
        let slow = |x: &[Tensor]| {
            std::thread::sleep(std::time::Duration::from_millis(100));
            Ok(x[0].clone())
        };
        for i in 0..MOST + 2 {
            gallery.add(i as u64, Split::Train, sketch("slow", &pixels, slow)).unwrap();
        }
        let ready = std::iter::from_fn(|| gallery.next_ready()).count();
        assert_eq!((ready >= 2, ready + all(&mut gallery).len()), (true, MOST + 2));
    }

    #[test]
    fn what_cannot_be_drawn_is_an_error_of_its_own_with_the_picture_s_name() {
        let x = Tensor::zeros((2, 3), candle_core::DType::F64, &Device::Cpu).unwrap();
        let mut gallery = Gallery::default();
        let good = |x: &[Tensor]| Ok(x[0].reshape((1, 2, 3))?.to_dtype(candle_core::DType::F64)?);
        gallery.add(1, Split::Train, sketch("good", &x, good)).unwrap();
        gallery.add(1, Split::Train, sketch("flat", &x, |x| Ok(x[0].clone()))).unwrap();
        gallery.add(1, Split::Train, sketch("lost", &x, |_| panic!("a test says so"))).unwrap();
        gallery.add(1, Split::Train, sketch("last", &x, good)).unwrap();
        let all = all(&mut gallery);
        let said = |i: usize| all[i].as_ref().err().map(ToString::to_string).unwrap_or_default();
        // Whatever dtype was drawn.
        assert_eq!(all[0].as_ref().unwrap().pixels.dtype(), candle_core::DType::F32);
        assert!(said(1).starts_with("picture `flat`: a picture is a tensor (C, H, W)"), "{}", said(1));
        assert_eq!(said(2), "picture `lost`: drawing it failed; the message is above");
        assert!(all[3].is_ok() && all.len() == 4);
    }
}
