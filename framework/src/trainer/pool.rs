//! The compute threads that a trainer's work runs on.

use std::sync::Arc;

use rayon::ThreadPool;
use tracing::{Dispatch, dispatcher};

use super::Trainer;
use crate::error::{Error, Result};
use crate::{accelerator, nn};

impl Trainer {
    /// Runs `work` in a thread pool of the configured size. Its threads have large stacks: candle's backward
    /// pass walks the graph recursively, and an unrolled recurrence is deeper than the usual stack allows.
    pub(crate) fn in_pool<T: Send>(
        &mut self,
        work: impl FnOnce(&mut Trainer) -> Result<T> + Send,
    ) -> Result<T> {
        self.config.check_sizes()?;
        candlepower_kernels::keep_freed_memory();
        candlepower_kernels::idle_soon();
        accelerator::set_matmul_precision(self.config.float32_matmul_precision);
        accelerator::set_benchmark(self.config.benchmark);
        let threads = self.config.threads.or(std::thread::available_parallelism().ok().map(usize::from));
        // Ranks on the same machine share its cores.
        let threads = threads.map_or(0, |threads| (threads / self.ranks.ranks_here()).max(1));
        let kernels = self.config.kernels;
        let before = self.pool.take().filter(|pool| pool.current_num_threads() == threads);
        let pool = before.map_or_else(|| compute_threads(threads), Ok)?;
        self.pool = Some(pool.clone());
        // The pool's thread acts for this thread, so it uses this thread's tracing dispatcher.
        let listener = dispatcher::get_default(Dispatch::clone);
        pool.install(|| dispatcher::with_default(&listener, || nn::with_kernels(kernels, || work(self))))
    }
}

/// A pool of this many compute threads; 0 means one per core.
fn compute_threads(threads: usize) -> Result<Arc<ThreadPool>> {
    const STACK: usize = 256 << 20; // Reserved, not used: pages are committed as the recursion needs them.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).stack_size(STACK);
    let pool = pool.thread_name(|i| format!("compute-{i}")).build();
    Ok(Arc::new(pool.map_err(|error| Error::msg(format!("cannot start the compute threads: {error}")))?))
}
