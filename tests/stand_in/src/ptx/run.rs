//! Runs a kernel block by block and thread by thread, each thread as far as it gets on its own.
//!
//! The last block and the last thread run first, which exposes code that relies on the opposite order without
//! waiting.

use super::lower::{Source, Step};
use super::{Kernel, LOCAL, SHARED};
use crate::memory::{Memory, Range};
use std::cell::{Cell, RefCell};

/// An error in a kernel.
#[derive(Debug)]
pub(crate) struct Fault(Box<str>);

impl From<String> for Fault {
    fn from(text: String) -> Self {
        Fault(text.into_boxed_str())
    }
}
impl From<&str> for Fault {
    fn from(text: &str) -> Self {
        text.to_string().into()
    }
}

/// The dimensions of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: [u32; 3],
    /// Bytes of dynamic shared memory, in addition to what the kernel declares.
    pub(crate) shared: usize,
}

/// Why a thread has stopped.
#[derive(Clone, Copy)]
pub(super) enum Stop {
    Done,
    /// Waits until all threads of the block get here.
    Barrier,
    /// Waits for threads of its warp.
    Warp(Wait),
}

/// A collective operation of a warp.
#[derive(Clone, Copy)]
pub(super) enum Wait {
    Sync {
        members: Source,
    },
    Shuffle {
        mode: char,
        d: usize,
        found: Option<usize>,
        value: Source,
        by: Source,
        clamp: Source,
        members: Source,
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Waiting,
    Done,
}

pub(super) struct Thread {
    pub(super) registers: Vec<u64>,
    pub(super) index: [u32; 3],
    /// Index within the block.
    pub(super) number: u32,
    at: usize,
    state: State,
    local: Vec<u8>,
}

pub(super) struct Block<'a> {
    pub(super) grid: Grid,
    pub(super) index: [u32; 3],
    pub(super) parameters: &'a [u8],
    shared: RefCell<Vec<u8>>,
    memory: &'a Memory,
    /// Recently accessed ranges, which the next access is likely to hit.
    recent: [Cell<Range>; 8],
}

impl Block<'_> {
    /// The host address of `bytes` bytes at `address`, as this thread sees it.
    pub(super) fn locate(&self, thread: &mut Thread, address: u64, bytes: usize) -> Result<*mut u8, Fault> {
        if !address.is_multiple_of(bytes as u64) {
            return Err(format!("{bytes} bytes at {address:#x}, which is no multiple of that").into());
        }
        let own = |memory: &mut [u8], at: u64, what: &str| match memory
            .get_mut(at as usize..at as usize + bytes)
        {
            Some(found) => Ok(found.as_mut_ptr()),
            None => {
                Err(Fault::from(format!("{bytes} bytes at {at} of {} bytes of {what} memory", memory.len())))
            }
        };
        match address {
            LOCAL.. => return own(&mut thread.local, address - LOCAL, "a thread's own"),
            SHARED.. => return own(&mut self.shared.borrow_mut(), address - SHARED, "shared"),
            _ => {}
        }
        for recent in &self.recent {
            if let Some(found) = recent.get().host_of(address, bytes) {
                return Ok(found);
            }
        }
        let range = self.memory.around(address);
        let found = range.and_then(|range| range.host_of(address, bytes));
        if let (Some(range), Some(_)) = (range, found) {
            self.recent[(range.start >> 9) as usize % self.recent.len()].set(range);
        }
        found.ok_or_else(|| self.memory.describe(address, bytes).into())
    }
}

/// Runs a kernel to completion.
pub(crate) fn run(kernel: &Kernel, grid: Grid, parameters: &[u8], memory: &Memory) -> Result<(), String> {
    let [x, y, z] = grid.blocks;
    let threads: u32 = grid.threads.iter().product();
    if threads == 0 || threads > 1024 || x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535 {
        return Err(format!("{}: a launch of {grid:?}", kernel.name));
    }
    let blocks = u64::from(x) * u64::from(y) * u64::from(z);
    // Each worker takes every n-th block; a single worker takes all if the order of blocks matters.
    let workers =
        if kernel.atomic { 1 } else { std::thread::available_parallelism().map_or(1, |it| it.get() as u64) };
    let work = |worker: u64| {
        let mut own = (0..blocks).rev().filter(|number| number % workers == worker).peekable();
        if own.peek().is_some() { some(kernel, grid, parameters, memory, own) } else { Ok(()) }
    };
    if workers == 1 || blocks * u64::from(threads) < FEW {
        return (0..workers).try_for_each(work);
    }
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..workers).map(|worker| scope.spawn(move || work(worker))).collect();
        let own = work(0);
        others
            .into_iter()
            .fold(own, |all, it| all.and(it.join().unwrap_or_else(|_| Err("a worker panicked".into()))))
    })
}

/// With fewer threads than this, a second worker is not worth it.
const FEW: u64 = 4096;

/// Runs some of a kernel's blocks.
fn some(
    kernel: &Kernel,
    grid: Grid,
    parameters: &[u8],
    memory: &Memory,
    blocks: impl Iterator<Item = u64>,
) -> Result<(), String> {
    let threads: u32 = grid.threads.iter().product();
    let mut all: Vec<Thread> = Vec::new();
    for number in 0..if kernel.collective { threads } else { 1 } {
        let (registers, local) = (vec![0; kernel.registers], vec![0xff; kernel.local]);
        all.push(Thread { registers, index: [0; 3], number, at: 0, state: State::Running, local });
    }
    let recent = std::array::from_fn(|_| Cell::new(Range::NONE));
    let shared = RefCell::new(vec![0xff; kernel.shared + grid.shared]);
    let mut block = Block { grid, index: [0; 3], parameters, shared, memory, recent };
    for number in blocks {
        let of = |all: u64, size: u32| ((all % u64::from(size)) as u32, all / u64::from(size));
        let (i, rest) = of(number, grid.blocks[0]);
        let (j, k) = of(rest, grid.blocks[1]);
        block.index = [i, j, k as u32];
        let result = match kernel.collective {
            true => together(kernel, &mut all, &block),
            false => (0..threads).rev().try_for_each(|number| {
                all[0].start(number, grid);
                all[0].go(kernel, &block).map(|_| ())
            }),
        };
        result.map_err(|fault| format!("{}, block {:?}: {}", kernel.name, block.index, fault.0))?;
    }
    Ok(())
}

/// Runs all threads of a block that wait for each other.
fn together(kernel: &Kernel, threads: &mut [Thread], block: &Block) -> Result<(), Fault> {
    block.shared.borrow_mut().fill(0xff);
    (0u32..).zip(threads.iter_mut()).for_each(|(number, thread)| thread.start(number, block.grid));
    let mut stops: Vec<Option<Stop>> = vec![None; threads.len()];
    loop {
        for (thread, stop) in threads.iter_mut().zip(&mut stops).rev() {
            if thread.state == State::Running {
                *stop = Some(thread.go(kernel, block)?);
            }
        }
        let mut moved = false;
        for (warp, stops) in threads.chunks_mut(32).zip(stops.chunks(32)) {
            moved |= meet(warp, stops, block)?;
        }
        if moved {
            continue;
        }
        if threads.iter().all(|it| it.state == State::Done) {
            return Ok(());
        }
        let waits = |stop: &Option<Stop>| matches!(stop, Some(Stop::Barrier | Stop::Done));
        if !stops.iter().all(waits) {
            return Err("threads of a warp wait for ones that never come".into());
        }
        threads.iter_mut().filter(|it| it.state == State::Waiting).for_each(|it| it.state = State::Running);
    }
}

/// Executes a warp's collective operations whose participants have all arrived.
fn meet(warp: &mut [Thread], stops: &[Option<Stop>], block: &Block) -> Result<bool, Fault> {
    let mut moved = false;
    for first in 0..warp.len() {
        let (State::Waiting, Some(Stop::Warp(wait))) = (warp[first].state, stops[first]) else { continue };
        let members = match wait {
            Wait::Sync { members } | Wait::Shuffle { members, .. } => members.get(&warp[first], block),
        };
        let takes_part = |lane: usize| members >> lane & 1 == 1;
        if !takes_part(first) {
            return Err("a thread takes part in what its own mask leaves out".into());
        }
        let at = warp[first].at;
        let is_there = |it: &Thread| it.state == State::Done || it.state == State::Waiting && it.at == at;
        if !(0..warp.len()).filter(|lane| takes_part(*lane)).all(|lane| is_there(&warp[lane])) {
            continue;
        }
        if let Wait::Shuffle { mode, d, found, value, by, clamp, .. } = wait {
            let values: Vec<u64> = warp.iter().map(|it| value.get(it, block)).collect();
            for lane in (0..warp.len()).filter(|lane| takes_part(*lane)) {
                if warp[lane].state == State::Done {
                    continue;
                }
                let (by, clamp) =
                    (by.get(&warp[lane], block) as usize & 31, clamp.get(&warp[lane], block) as usize);
                let segment = clamp >> 8 & 31;
                let (lowest, highest) = (lane & segment, lane & segment | clamp & 31 & !segment);
                let (from, valid) = match mode {
                    'u' => (lane.wrapping_sub(by), lane >= by && lane - by >= highest),
                    'd' => (lane + by, lane + by <= highest),
                    'b' => (lane ^ by, lane ^ by <= highest),
                    _ => (lowest | by & !segment, lowest | by & !segment <= highest),
                };
                let from = if valid { from } else { lane };
                let there = from < warp.len() && takes_part(from) && warp[from].state != State::Done;
                if !there {
                    return Err(
                        format!("lane {lane} takes a value of lane {from}, which takes no part").into()
                    );
                }
                warp[lane].registers[d] = values[from] & 0xffff_ffff;
                if let Some(found) = found {
                    warp[lane].registers[found] = u64::from(valid);
                }
            }
        }
        for lane in (0..warp.len()).filter(|lane| takes_part(*lane)) {
            if warp[lane].state == State::Waiting {
                warp[lane].state = State::Running;
            }
        }
        moved = true;
    }
    Ok(moved)
}

impl Thread {
    fn start(&mut self, number: u32, grid: Grid) {
        let [x, y, _] = grid.threads;
        (self.number, self.index) = (number, [number % x, number / x % y, number / (x * y)]);
        (self.at, self.state) = (0, State::Running);
        self.local.fill(0xff);
    }

    /// Runs until the thread is done or must wait.
    fn go(&mut self, kernel: &Kernel, block: &Block) -> Result<Stop, Fault> {
        loop {
            let Some(instruction) = kernel.code.get(self.at) else {
                self.state = State::Done;
                return Ok(Stop::Done);
            };
            self.at += 1;
            if let Some((register, negated)) = instruction.guard
                && (self.registers[register] & 1 == 1) == negated
            {
                continue;
            }
            match &instruction.step {
                Step::Do(action) => action(self, block).map_err(|fault| {
                    Fault::from(format!("thread {:?}: {}: {}", self.index, instruction.text, fault.0))
                })?,
                Step::Jump(to) => self.at = *to,
                Step::Stop(stop) => {
                    let done = matches!(stop, Stop::Done);
                    self.state = if done { State::Done } else { State::Waiting };
                    return Ok(*stop);
                }
            }
        }
    }
}
