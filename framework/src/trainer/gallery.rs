//! Pictures on their way to the callbacks: from the device, and through drawing and encoding, while training goes on.

use std::collections::VecDeque;
use std::thread::JoinHandle;

use candle_core::Tensor;
use candlepower_kernels::Download;

use super::phase;
use crate::callback::Picture;
use crate::data::Split;
use crate::error::{Error, Result};
use crate::module::{Draw, Sketch};

/// Pictures that were asked for and that nobody has seen yet, in the order in which they were asked for.
#[derive(Default)]
pub(super) struct Gallery {
    coming: VecDeque<Coming>,
}

/// A picture that is still to be seen.
struct Coming {
    step: u64,
    split: Split,
    name: String,
    stage: Stage,
}

/// How far it is.
enum Stage {
    /// What it is of is on its way to the host.
    Copying { of: Vec<Download>, draw: Draw },
    /// A thread draws it. That never touches the device, which one thread alone may ask for work.
    Drawing(JoinHandle<Result<Picture>>),
}

impl Gallery {
    /// Takes in a picture of the tensors' values now, at a step and of a split.
    pub(super) fn add(&mut self, step: u64, split: Split, sketch: Sketch) -> Result<()> {
        let Sketch { name, of, draw } = sketch;
        let of = of.iter().map(Download::start).collect::<candle_core::Result<_>>()?;
        self.coming.push_back(Coming { step, split, name, stage: Stage::Copying { of, draw } });
        Ok(())
    }

    /// The pictures that have come to be ready, in order; does not wait.
    pub(super) fn poll(&mut self) -> Result<Vec<Picture>> {
        self.coming.iter_mut().try_for_each(Coming::draw_if_copied)?;
        let mut ready = Vec::new();
        while self.coming.front().is_some_and(Coming::is_drawn) {
            ready.extend(self.coming.pop_front().map(Coming::finish).transpose()?);
        }
        Ok(ready)
    }

    /// All pictures, in order; waits for them.
    pub(super) fn finish(&mut self) -> Result<Vec<Picture>> {
        if self.coming.is_empty() {
            return Ok(Vec::new());
        }
        let _phase = phase!("pictures");
        self.coming.iter_mut().try_for_each(Coming::draw)?;
        self.coming.drain(..).map(Coming::finish).collect()
    }
}

impl Coming {
    fn draw_if_copied(&mut self) -> Result<()> {
        let Stage::Copying { of, .. } = &self.stage else { return Ok(()) };
        for download in of {
            if !download.is_done()? {
                return Ok(());
            }
        }
        self.draw()
    }

    /// Hands what was copied to a thread that draws, unless that has been done.
    fn draw(&mut self) -> Result<()> {
        let Stage::Copying { of, draw } = &mut self.stage else { return Ok(()) };
        let of: Vec<Tensor> = of.drain(..).map(Download::finish).collect::<candle_core::Result<_>>()?;
        let (draw, step, split, name) = (draw.clone(), self.step, self.split, self.name.clone());
        self.stage = Stage::Drawing(std::thread::spawn(move || Picture::new(step, split, &name, draw(&of)?)));
        Ok(())
    }

    fn is_drawn(&self) -> bool {
        matches!(&self.stage, Stage::Drawing(drawing) if drawing.is_finished())
    }

    fn finish(mut self) -> Result<Picture> {
        self.draw()?;
        let picture = match self.stage {
            Stage::Drawing(drawing) => drawing.join().unwrap_or_else(|_| {
                Err(Error::msg(format!("drawing `{}` failed; the message is above", self.name)))
            }),
            Stage::Copying { .. } => Err(Error::msg("a picture was not drawn")),
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

    fn names(pictures: &[Picture]) -> Vec<&str> {
        pictures.iter().map(|picture| picture.name.as_str()).collect()
    }

    #[test]
    fn pictures_come_in_order_while_others_are_drawn_and_of_the_values_they_were_asked_for() {
        let pixels = Var::new(&[[[0.25f32, 0.75]]], &Device::Cpu).unwrap();
        let mut gallery = Gallery::default();
        // The first waits to be told.
        let (tell, told) = mpsc::channel::<()>();
        let told = Mutex::new(told);
        let slow = move |x: &[Tensor]| {
            told.lock().unwrap().recv().unwrap();
            Ok(x[0].clone())
        };
        gallery.add(7, Split::Train, sketch("slow", &pixels, slow)).unwrap();
        gallery.add(7, Split::Val, sketch("quick", &pixels, |x| Ok(x[0].clone()))).unwrap();
        approach(&[(&pixels, &pixels.zeros_like().unwrap())], 1.).unwrap();
        assert!(gallery.poll().unwrap().is_empty(), "the first is not drawn, and the second comes after it");
        tell.send(()).unwrap();
        let pictures = gallery.finish().unwrap();
        assert_eq!(names(&pictures), ["slow", "quick"]);
        assert_eq!((pictures[1].step, pictures[1].split), (7, Split::Val));
        assert_eq!(pictures[0].pixels.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.25, 0.75]);
        let png = image::load_from_memory(&pictures[0].png).unwrap().to_rgb8();
        assert_eq!((png.dimensions(), png.get_pixel(1, 0).0), ((2, 1), [191; 3]));
        assert!(gallery.finish().unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_drawn_is_an_error_with_the_picture_s_name() {
        let x = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let mut gallery = Gallery::default();
        gallery.add(1, Split::Train, sketch("filters", &x, |x| Ok(x[0].clone()))).unwrap();
        let said = gallery.finish().unwrap_err().to_string();
        assert!(
            said.starts_with("picture `filters`: a picture is a tensor (C, H, W)") && said.contains("[2, 3]"),
            "{said}"
        );
        gallery.add(1, Split::Train, sketch("filters", &x, |_| panic!("no"))).unwrap();
        let said = gallery.finish().unwrap_err().to_string();
        assert_eq!(said, "picture `filters`: drawing `filters` failed; the message is above");
    }
}
