//! Batches prefetched by worker threads, in an order that does not depend on the number of threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use candle_core::Device;
use crossbeam_channel::{Receiver, Sender, bounded};

use super::source::Jobs;
use crate::batch::Batch;
use crate::error::{Error, Result};

/// How long dropping a loader waits for its workers.
const PATIENCE: Duration = Duration::from_secs(5);

/// A micro-batch to make, on any free thread.
pub(crate) struct Job<B> {
    /// `None` for a rank without samples in the step.
    pub(crate) make: Option<Box<dyn FnOnce() -> Result<B> + Send>>,
    pub(crate) place: Place,
}

/// The position of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its number in the step, over all ranks.
    pub(crate) number: usize,
    /// Whether it is this rank's last one in the step.
    pub(crate) ends_step: bool,
    /// Samples in the step, over all ranks.
    pub(crate) step_samples: usize,
    /// Whether the step is the last of its epoch.
    pub(crate) ends_epoch: bool,
}

/// A loaded micro-batch; `batch` is `None` for a rank without samples in the step.
pub(crate) struct Loaded<B> {
    pub(crate) batch: Option<B>,
    pub(crate) place: Place,
}

/// Iterates over micro-batches prefetched by worker threads.
///
/// A worker that takes a job queues the channel that will deliver its batch before any other worker can take
/// a job, so batches arrive in job order for any number of workers. The bounded queue limits how many batches
/// are held.
pub(crate) struct Loader<B: Batch> {
    device: Device,
    /// Without workers: batches are made on request.
    inline: Option<Jobs<B>>,
    answers: Receiver<Answer<B>>,
    workers: Vec<JoinHandle<()>>,
}

type Answer<B> = Receiver<Result<Loaded<B>>>;
/// A job, and the channel for its batch.
type Request<B> = (Result<Job<B>>, Sender<Result<Loaded<B>>>);

impl<B: Batch> Loader<B> {
    /// Starts `workers` threads that together prefetch at most `ahead` micro-batches and copy them to
    /// `device`. With 0 workers, batches are made on request.
    pub(crate) fn new(jobs: Jobs<B>, workers: usize, ahead: usize, device: &Device) -> Self {
        let device = device.clone();
        if workers == 0 {
            return Self {
                device,
                inline: Some(jobs),
                answers: crossbeam_channel::never(),
                workers: Vec::new(),
            };
        }
        let (to_loader, answers) = bounded(ahead.max(1));
        let jobs = Arc::new(Mutex::new(jobs));
        let work = |_| {
            let (jobs, to_loader, device) = (jobs.clone(), to_loader.clone(), device.clone());
            std::thread::spawn(move || {
                while let Some((job, answer)) = take(&jobs, &to_loader) {
                    // Sending fails if the loader was dropped, which is not an error.
                    let _ = answer.send(job.and_then(|job| made(job, &device)));
                }
            })
        };
        let workers = (0..workers).map(work).collect();
        Self { device, inline: None, answers, workers }
    }
}

/// Takes the next job and queues its answer; `None` if there are no more jobs or the loader is gone.
fn take<B: Batch>(jobs: &Mutex<Jobs<B>>, to_loader: &Sender<Answer<B>>) -> Option<Request<B>> {
    let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
    let next = catch_unwind(AssertUnwindSafe(|| jobs.next()));
    let job = next.unwrap_or_else(|_| {
        // The rest of the iterator cannot be trusted after a panic.
        *jobs = Box::new(std::iter::empty());
        Some(Err(Error::msg("the data stream panicked; its message is above")))
    })?;
    let (answer, receiver) = bounded(1);
    to_loader.send(receiver).ok()?;
    Some((job, answer))
}

fn made<B: Batch>(job: Job<B>, device: &Device) -> Result<Loaded<B>> {
    let Job { make, place } = job;
    let batch = make.map(|make| make()?.to_device(device)).transpose()?;
    Ok(Loaded { batch, place })
}

impl<B: Batch> Iterator for Loader<B> {
    type Item = Result<Loaded<B>>;

    fn next(&mut self) -> Option<Result<Loaded<B>>> {
        if let Some(jobs) = &mut self.inline {
            let device = &self.device;
            return Some(jobs.next()?.and_then(|job| made(job, device)));
        }
        let answer = self.answers.recv().ok()?.recv();
        Some(answer.unwrap_or_else(|_| Err(Error::msg("a data worker panicked; its message is above"))))
    }
}

impl<B: Batch> Drop for Loader<B> {
    fn drop(&mut self) {
        // Without a receiver, the workers end; but one that is waiting for data may never do so.
        self.answers = crossbeam_channel::never();
        let since = Instant::now();
        for worker in self.workers.drain(..) {
            while !worker.is_finished() && since.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(1));
            }
            if worker.is_finished() {
                // `next` has already reported a panic.
                let _ = worker.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use candle_core::Tensor;

    use super::*;
    use crate::batch::Tensors;
    use crate::data::source::{Items, Share, Start};
    use crate::data::{Dataset, Order, Pass, Sample, Source, Split, Stream};

    fn tensors(samples: &[Sample], value: impl Fn(&Sample) -> Result<f32>) -> Result<Tensors> {
        let values = samples.iter().map(value).collect::<Result<Vec<f32>>>()?;
        Ok(Tensors(vec![Tensor::new(values, &Device::Cpu)?]))
    }

    /// Sample i is i plus its own random number; sample 13 fails if `broken`.
    #[derive(Default)]
    struct Numbers {
        broken: bool,
        made: Arc<AtomicUsize>,
    }

    impl Dataset for Numbers {
        type Batch = Tensors;

        fn len(&self) -> usize {
            20
        }

        fn spec(&self) {}

        fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
            use rand::Rng;
            self.made.fetch_add(1, Ordering::SeqCst);
            // Provoke races between workers, which would change the order.
            std::thread::yield_now();
            tensors(samples, |s| match s.index {
                13 if self.broken => Err(Error::msg("no such number")),
                index => Ok(index as f32 + s.rng().random::<f32>()),
            })
        }
    }

    /// The numbers from 100 * epoch on: seven in even epochs, eight in odd ones.
    struct Counter;

    impl Stream for Counter {
        type Batch = Tensors;
        type Item = u64;

        fn spec(&self) {}

        fn items(&self, pass: Pass) -> Result<Items<u64>> {
            Ok(Box::new((0..7 + pass.epoch % 2).map(move |i| Ok(100 * pass.epoch + i))))
        }

        fn batch(&self, items: Vec<u64>, samples: &[Sample]) -> Result<Tensors> {
            assert!(items.iter().zip(samples).all(|(item, sample)| item % 100 == sample.index as u64));
            Ok(Tensors(vec![Tensor::from_iter(items.into_iter().map(|i| i as f32), &Device::Cpu)?]))
        }
    }

    fn load(source: Source<Tensors>, order: &Order, from: (u64, u64), workers: usize) -> Loader<Tensors> {
        load_share(source, order, from, workers, Share::default())
    }

    fn load_share(
        source: Source<Tensors>,
        order: &Order,
        from: (u64, u64),
        workers: usize,
        share: Share,
    ) -> Loader<Tensors> {
        let samples_in_epoch = from.1 * order.batch_size as u64;
        let start =
            Start { epoch: from.0, step_in_epoch: from.1, samples_in_epoch, micro_batch_size: 2, share };
        Loader::new(source.training(order, start), workers, 4, &Device::Cpu)
    }

    #[test]
    fn ranks_share_out_the_micro_batches_of_each_step() {
        let stream: fn() -> Source<Tensors> = || Source::Stream(Arc::new(Counter));
        let indexed: fn() -> Source<Tensors> = || Source::Indexed(Arc::new(Numbers::default()));
        for source in [stream, indexed] {
            // Steps of 5 samples each: micro-batches of 2, 2 and 1; the last step of an epoch has fewer.
            let order = Order::new(3, source().len().unwrap_or(usize::MAX), 5);
            let by_step = |share: Share| {
                let mut steps = vec![Vec::new()];
                for loaded in load_share(source(), &order, (0, 0), 2, share) {
                    let Loaded { batch, place } = loaded.unwrap();
                    let step = steps.last_mut().unwrap();
                    let values = batch.map(|batch| batch.0[0].to_vec1::<f32>().unwrap());
                    step.push((place.number, values, place.step_samples, place.ends_epoch));
                    if place.ends_step {
                        if steps.len() == 6 {
                            break;
                        }
                        steps.push(Vec::new());
                    }
                }
                steps
            };
            let whole = by_step(Share::default());
            for of in [2, 3, 4] {
                let parts: Vec<_> = (0..of).map(|rank| by_step(Share { rank, of })).collect();
                for (step, expected) in whole.iter().enumerate() {
                    // Every rank receives every step and its size, even without a share of it.
                    let sizes = parts.iter().flat_map(|part| &part[step]).map(|micro| (micro.2, micro.3));
                    assert!(sizes.into_iter().all(|size| size == (expected[0].2, expected[0].3)));
                    let mut all: Vec<_> = parts.iter().flat_map(|part| part[step].clone()).collect();
                    all.retain(|(_, values, ..)| values.is_some());
                    all.sort_by_key(|(number, ..)| *number);
                    assert_eq!(&all, expected, "step {step} of {of} ranks");
                }
            }
        }
    }

    /// The values, step size and end-of-epoch flag of the first `batches` micro-batches.
    fn read(loader: Loader<Tensors>, batches: usize) -> Vec<(Vec<f32>, usize, bool)> {
        let values = |Loaded { batch, place }: Loaded<Tensors>| {
            (batch.unwrap().0[0].to_vec1().unwrap(), place.step_samples, place.ends_epoch)
        };
        loader.take(batches).map(|loaded| values(loaded.unwrap())).collect()
    }

    #[test]
    fn batches_do_not_depend_on_the_number_of_workers() {
        let indexed = || Source::Indexed(Arc::new(Numbers::default()));
        let stream = || Source::Stream(Arc::new(Counter));
        for source in [indexed, stream as fn() -> _] {
            let order = Order::new(3, 20, 3);
            let alone = read(load(source(), &order, (0, 0), 0), 30);
            assert_eq!(alone.len(), 30);
            assert_eq!(alone, read(load(source(), &order, (0, 0), 1), 30));
            assert_eq!(alone, read(load(source(), &order, (0, 0), 4), 30));
        }
    }

    #[test]
    fn a_stream_is_cut_into_steps_and_micro_batches_and_resumed() {
        let order = Order::new(0, usize::MAX, 3);
        let all = read(load(Source::Stream(Arc::new(Counter)), &order, (0, 0), 2), 9);
        let expected: [(&[f32], usize, bool); 9] = [
            (&[0., 1.], 3, false),
            (&[2.], 3, false),
            (&[3., 4.], 3, false),
            (&[5.], 3, false),
            (&[6.], 1, true),
            (&[100., 101.], 3, false),
            (&[102.], 3, false),
            (&[103., 104.], 3, false),
            (&[105.], 3, false),
        ];
        assert_eq!(all, expected.map(|(values, samples, end)| (values.to_vec(), samples, end)));
        // Step 1 of epoch 0 begins at the third micro-batch, step 1 of epoch 1 at the eighth.
        assert_eq!(all[2..], read(load(Source::Stream(Arc::new(Counter)), &order, (0, 1), 1), 7));
        assert_eq!(all[7..], read(load(Source::Stream(Arc::new(Counter)), &order, (1, 1), 1), 2));
        // A limit ends the epoch early.
        let short = read(load(Source::Stream(Arc::new(Counter)), &order.clone().limited(1), (0, 0), 1), 3);
        assert_eq!(short[1..], [(vec![2.], 3, true), (vec![100., 101.], 3, true)]);
    }

    #[test]
    fn a_failing_sample_is_named_in_its_turn() {
        let order = Order::new(3, 20, 1);
        let turn = order.from(0, 0).position(|(s, _)| s[0].index == 13).unwrap();
        for workers in [0, 3] {
            let numbers = Numbers { broken: true, ..Default::default() };
            let loader = load(Source::Indexed(Arc::new(numbers)), &order, (0, 0), workers);
            let results: Vec<_> = loader.take(20).collect();
            assert_eq!(results.iter().position(Result::is_err), Some(turn));
            let message = results[turn].as_ref().err().unwrap().to_string();
            assert_eq!(message, "cannot read sample 13: no such number");
        }
    }

    #[test]
    fn no_more_batches_are_made_than_may_be_held() {
        let made = Arc::new(AtomicUsize::new(0));
        let numbers = Numbers { made: made.clone(), ..Default::default() };
        let mut loader = load(Source::Indexed(Arc::new(numbers)), &Order::new(0, 20, 2), (0, 0), 2);
        loader.next().unwrap().unwrap();
        // Dropping the loader waits for the workers, so all prefetched batches have been made by then.
        drop(loader);
        // One read, four prefetched, and one held by each of the two workers.
        assert!(made.load(Ordering::SeqCst) <= 1 + 4 + 2, "{made:?}");
    }

    #[test]
    fn evaluation_takes_every_sample_once_or_a_limit() {
        let pass = Pass::evaluation(Split::Val, 3);
        for source in
            [Source::<Tensors>::Indexed(Arc::new(Numbers::default())), Source::Stream(Arc::new(Counter))]
        {
            let count = |samples| {
                let jobs = source.evaluation(pass, 3, samples, Share::default()).unwrap();
                let sizes = Loader::new(jobs, 2, 4, &Device::Cpu)
                    .map(|l| l.unwrap().batch.unwrap().0[0].elem_count());
                sizes.collect::<Vec<_>>()
            };
            let samples: usize = count(usize::MAX).iter().sum();
            assert_eq!(samples, source.len().unwrap_or(7));
            assert_eq!(count(6), [3, 3]);
            assert_eq!(count(5), [3, 2]);
        }
    }
}
