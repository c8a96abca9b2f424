//! Batches made ahead by worker threads, in an order that does not depend on how many there are.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::{Dataset, Sample};
use crate::batch::Batch;
use crate::error::{Error, Result};

/// Batches that each worker may be ahead of training.
const AHEAD: usize = 2;

/// Iterates over batches that worker threads make ahead of time.
///
/// Every batch has a channel of its own for the answer, and the loader reads those channels in the order it asked:
/// so batches come in the order of `samples` whatever the number of workers, and at most `2 * workers` are held.
pub struct Loader<B: Batch, I> {
    dataset: Arc<dyn Dataset<Batch = B>>,
    samples: I,
    requests: Option<Sender<Request<B>>>,
    answers: VecDeque<Receiver<Result<B>>>,
    ahead: usize,
    workers: Vec<JoinHandle<()>>,
}

struct Request<B> {
    samples: Vec<Sample>,
    answer: Sender<Result<B>>,
}

impl<B: Batch, I: Iterator<Item = Vec<Sample>>> Loader<B, I> {
    /// Starts `workers` threads (0: batches are made when they are asked for) on the batches that `samples` lists.
    pub fn new(dataset: Arc<dyn Dataset<Batch = B>>, samples: I, workers: usize) -> Self {
        let (sender, receiver) = unbounded::<Request<B>>();
        let spawn = |_| {
            let (dataset, requests) = (dataset.clone(), receiver.clone());
            std::thread::spawn(move || {
                for request in requests {
                    // Nobody is waiting any more when the loader was dropped: not an error.
                    let _ = request.answer.send(read(&*dataset, &request.samples));
                }
            })
        };
        let threads = (0..workers).map(spawn).collect();
        Self {
            dataset,
            samples,
            requests: (workers > 0).then_some(sender),
            answers: VecDeque::new(),
            ahead: workers * AHEAD,
            workers: threads,
        }
    }

    fn ask(&mut self, requests: &Sender<Request<B>>) {
        while self.answers.len() < self.ahead {
            let Some(samples) = self.samples.next() else { return };
            let (answer, receiver) = bounded(1);
            // The workers end only after this sender is dropped, so there is always someone to receive.
            let _ = requests.send(Request { samples, answer });
            self.answers.push_back(receiver);
        }
    }
}

impl<B: Batch, I: Iterator<Item = Vec<Sample>>> Iterator for Loader<B, I> {
    type Item = Result<B>;

    fn next(&mut self) -> Option<Result<B>> {
        let Some(requests) = self.requests.clone() else {
            return Some(read(&*self.dataset, &self.samples.next()?));
        };
        self.ask(&requests);
        let answer = self.answers.pop_front()?.recv();
        self.ask(&requests);
        Some(answer.unwrap_or_else(|_| Err(Error::msg("a data worker panicked; its message is above"))))
    }
}

impl<B: Batch, I> Drop for Loader<B, I> {
    fn drop(&mut self) {
        self.answers.clear();
        self.requests = None;
        for worker in self.workers.drain(..) {
            // A worker that panicked has been reported by `next`.
            let _ = worker.join();
        }
    }
}

fn read<B: Batch>(dataset: &dyn Dataset<Batch = B>, samples: &[Sample]) -> Result<B> {
    dataset.batch(samples).map_err(|error| {
        let indices: Vec<String> = samples.iter().map(|s| s.index.to_string()).collect();
        Error::msg(format!("cannot read sample(s) {}: {error}", indices.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::batch::Tensors;
    use crate::data::Order;

    /// Sample i is the number i plus a random number of its own; sample 13 is broken where asked for.
    struct Numbers {
        broken: bool,
    }

    impl Dataset for Numbers {
        type Batch = Tensors;

        fn len(&self) -> usize {
            20
        }

        fn spec(&self) {}

        fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
            use rand::Rng;
            let value = |s: &Sample| match s.index {
                13 if self.broken => Err(Error::msg("no such number")),
                index => Ok(index as f32 + s.rng().random::<f32>()),
            };
            // The later a sample, the quicker: workers that raced would come in the wrong order.
            std::thread::yield_now();
            let values = samples.iter().map(value).collect::<Result<Vec<f32>>>()?;
            Ok(Tensors(vec![Tensor::new(values, &Device::Cpu)?]))
        }
    }

    fn batches(workers: usize) -> Vec<Vec<f32>> {
        let order = Order { seed: 3, len: 20, batch_size: 3 };
        Loader::new(Arc::new(Numbers { broken: false }), order.from(0, 0).take(30), workers)
            .map(|batch| batch.unwrap().0[0].to_vec1().unwrap())
            .collect()
    }

    #[test]
    fn batches_do_not_depend_on_the_number_of_workers() {
        let alone = batches(0);
        assert_eq!(alone.len(), 30);
        assert_eq!(alone, batches(1));
        assert_eq!(alone, batches(4));
    }

    #[test]
    fn a_failing_sample_is_named_in_its_turn() {
        for workers in [0, 3] {
            let order = Order { seed: 3, len: 20, batch_size: 1 };
            let loader = Loader::new(Arc::new(Numbers { broken: true }), order.epoch(0), workers);
            let turn = order.epoch(0).position(|s| s[0].index == 13).unwrap();
            let results: Vec<_> = loader.collect();
            assert_eq!(results.iter().position(Result::is_err), Some(turn));
            let message = results[turn].as_ref().err().unwrap().to_string();
            assert_eq!(message, "cannot read sample(s) 13: no such number");
        }
    }
}
