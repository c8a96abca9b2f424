//! Devices: lazily executed streams, events, and graphs.
//!
//! Work queued on a stream runs only when someone waits for it, or for work that depends on it, and no
//! further than that. So code that forgets to wait always reads data that is not there yet.

use crate::memory::Memory;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{ThreadId, current};
use std::time::{Duration, Instant};

/// The driver's error codes.
pub(crate) mod code {
    pub(crate) const INVALID_VALUE: i32 = 1;
    pub(crate) const OUT_OF_MEMORY: i32 = 2;
    pub(crate) const INVALID_DEVICE: i32 = 101;
    pub(crate) const INVALID_IMAGE: i32 = 200;
    pub(crate) const INVALID_CONTEXT: i32 = 201;
    pub(crate) const INVALID_HANDLE: i32 = 400;
    pub(crate) const NOT_FOUND: i32 = 500;
    pub(crate) const NOT_READY: i32 = 600;
    pub(crate) const ILLEGAL_ADDRESS: i32 = 700;
    pub(crate) const CAPTURE_UNSUPPORTED: i32 = 900;
    pub(crate) const CAPTURE_INVALIDATED: i32 = 901;
    pub(crate) const CAPTURE_UNJOINED: i32 = 904;
    pub(crate) const CAPTURE_ISOLATION: i32 = 905;
}

/// Environment variables: the number of devices, and the memory of each in bytes.
const DEVICES: &str = "CANDLEPOWER_STAND_IN_DEVICES";
const MEMORY: &str = "CANDLEPOWER_STAND_IN_MEMORY";

/// Whether something is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Progress {
    Done,
    /// Waiting for other processes; try again.
    Pending,
}

/// An operation on a stream.
pub(crate) type Work = Arc<dyn Fn(&mut Memory) -> Result<Progress, String> + Send + Sync>;

enum Entry {
    Work(&'static str, Work),
    /// Record an event.
    Record(u64),
    /// Wait until another stream has done this many entries.
    Wait {
        stream: u64,
        position: u64,
    },
}

#[derive(Default)]
struct Stream {
    queue: VecDeque<Entry>,
    /// The number of entries queued, and done, so far.
    asked: u64,
    done: u64,
    /// While a graph is captured: the graph that receives the stream's work instead.
    capture: Option<u64>,
}

#[derive(Default)]
struct Event {
    /// Its last record: a stream, and the number of the entry there.
    recorded: Option<(u64, u64)>,
    /// Its last record in a capture: the graph, the stream, and the number of nodes at that point.
    captured: Option<(u64, u64, usize)>,
    time: Option<Instant>,
}

/// Recorded work that can be replayed.
#[derive(Default)]
pub(crate) struct Graph {
    nodes: Vec<(&'static str, Work)>,
    /// Memory that it allocates.
    memory: Vec<u64>,
    /// During capture: the capturing thread, the mode, and the stream.
    making: Option<(ThreadId, u32, u64)>,
    /// Streams in the capture, each with the number of nodes after its last work, and at the point last
    /// joined by another stream.
    forks: HashMap<u64, [usize; 2]>,
    broken: bool,
}

pub(crate) struct Device {
    pub(crate) memory: Memory,
    streams: HashMap<u64, Stream>,
    events: HashMap<u64, Event>,
    graphs: HashMap<u64, Graph>,
    next: u64,
    ordinal: u64,
    /// After a kernel has failed, every call fails with this error.
    fault: Option<i32>,
}

static ALL: OnceLock<Vec<Mutex<Device>>> = OnceLock::new();

fn all() -> &'static [Mutex<Device>] {
    let number = |name: &str, otherwise: usize| {
        std::env::var(name).ok().and_then(|it| it.parse().ok()).unwrap_or(otherwise)
    };
    ALL.get_or_init(|| {
        let memory = number(MEMORY, 8 << 30);
        let device = |ordinal| Device {
            memory: Memory::new(memory),
            streams: HashMap::new(),
            events: HashMap::new(),
            graphs: HashMap::new(),
            next: 1,
            ordinal,
            fault: None,
        };
        (0..number(DEVICES, 2) as u64).map(|ordinal| Mutex::new(device(ordinal))).collect()
    })
}

pub(crate) fn count() -> usize {
    all().len()
}

/// A device by its ordinal.
pub(crate) fn device(ordinal: usize) -> Result<MutexGuard<'static, Device>, i32> {
    let device = all().get(ordinal).ok_or(code::INVALID_DEVICE)?;
    Ok(device.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The device that a handle belongs to.
pub(crate) fn owner(handle: u64) -> usize {
    (handle >> 32) as usize
}

/// Handles are plain numbers, never dereferenced. The upper half is the device's ordinal.
fn handle(ordinal: u64, number: u64) -> u64 {
    ordinal << 32 | number << 4
}

/// Polls until something is done.
pub(crate) fn wait(
    ordinal: usize,
    mut over: impl FnMut(&mut Device) -> Result<Progress, i32>,
) -> Result<(), i32> {
    loop {
        if over(&mut *device(ordinal)?)? == Progress::Done {
            return Ok(());
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

impl Device {
    fn new_handle(&mut self) -> u64 {
        self.next += 1;
        handle(self.ordinal, self.next)
    }

    pub(crate) fn ok(&self) -> Result<(), i32> {
        self.fault.map_or(Ok(()), Err)
    }

    pub(crate) fn new_stream(&mut self) -> u64 {
        let handle = self.new_handle();
        self.streams.insert(handle, Stream::default());
        handle
    }

    pub(crate) fn drop_stream(&mut self, stream: u64) -> Result<(), i32> {
        self.streams.remove(&stream).map(drop).ok_or(code::INVALID_HANDLE)
    }

    pub(crate) fn new_event(&mut self) -> u64 {
        let handle = self.new_handle();
        self.events.insert(handle, Event::default());
        handle
    }

    pub(crate) fn drop_event(&mut self, event: u64) -> Result<(), i32> {
        self.events.remove(&event).map(drop).ok_or(code::INVALID_HANDLE)
    }

    fn stream(&mut self, stream: u64) -> Result<&mut Stream, i32> {
        match stream {
            0 => Ok(self.streams.entry(0).or_default()),
            _ => self.streams.get_mut(&stream).ok_or(code::INVALID_HANDLE),
        }
    }

    /// Queues work on a stream.
    pub(crate) fn ask(&mut self, stream: u64, name: &'static str, work: Work) -> Result<(), i32> {
        self.ok()?;
        if let Some(graph) = self.stream(stream)?.capture {
            let graph = self.graphs.get_mut(&graph).ok_or(code::INVALID_HANDLE)?;
            graph.nodes.push((name, work));
            graph.forks.entry(stream).or_default()[0] = graph.nodes.len();
            return if graph.broken { Err(code::CAPTURE_INVALIDATED) } else { Ok(()) };
        }
        self.push(stream, Entry::Work(name, work))
    }

    fn push(&mut self, stream: u64, entry: Entry) -> Result<(), i32> {
        let stream = self.stream(stream)?;
        stream.queue.push_back(entry);
        stream.asked += 1;
        Ok(())
    }

    /// Runs a stream until this many of its entries are done.
    fn advance(&mut self, stream: u64, until: u64) -> Result<Progress, i32> {
        self.ok()?;
        while self.stream(stream)?.done < until {
            match self.stream(stream)?.queue.front() {
                None => return Err(code::INVALID_HANDLE),
                Some(Entry::Wait { stream: other, position }) => {
                    let (other, position) = (*other, *position);
                    let is_there = other == stream || !self.streams.contains_key(&other);
                    if !is_there && self.advance(other, position)? == Progress::Pending {
                        return Ok(Progress::Pending);
                    }
                }
                Some(Entry::Record(event)) => {
                    let event = *event;
                    if let Some(event) = self.events.get_mut(&event) {
                        event.time = Some(Instant::now());
                    }
                }
                Some(Entry::Work(name, work)) => {
                    let (name, work) = (*name, work.clone());
                    match work(&mut self.memory) {
                        Ok(Progress::Done) => {}
                        Ok(Progress::Pending) => return Ok(Progress::Pending),
                        Err(error) => {
                            eprintln!("stand-in, device {}: {name}: {error}", self.ordinal);
                            self.fault = Some(code::ILLEGAL_ADDRESS);
                            return Err(code::ILLEGAL_ADDRESS);
                        }
                    }
                }
            }
            let stream = self.stream(stream)?;
            stream.queue.pop_front();
            stream.done += 1;
        }
        Ok(Progress::Done)
    }

    /// Runs everything queued on a stream.
    pub(crate) fn finish(&mut self, stream: u64) -> Result<Progress, i32> {
        if let Some(graph) = self.stream(stream)?.capture {
            return Err(self.break_graph(graph));
        }
        let until = self.stream(stream)?.asked;
        self.advance(stream, until)
    }

    /// Runs everything queued on all streams.
    pub(crate) fn finish_all(&mut self) -> Result<Progress, i32> {
        self.forbid_in_captures()?;
        let mut streams: Vec<u64> = self.streams.keys().copied().collect();
        streams.sort_unstable();
        for stream in streams {
            if self.finish(stream)? == Progress::Pending {
                return Ok(Progress::Pending);
            }
        }
        Ok(Progress::Done)
    }

    pub(crate) fn record(&mut self, event: u64, stream: u64) -> Result<(), i32> {
        if let Some(number) = self.stream(stream)?.capture {
            let graph = self.graphs.get(&number).ok_or(code::INVALID_HANDLE)?;
            let captured = Some((number, stream, graph.nodes.len()));
            *self.events.get_mut(&event).ok_or(code::INVALID_HANDLE)? =
                Event { captured, ..Event::default() };
            return Ok(());
        }
        self.push(stream, Entry::Record(event))?;
        let position = self.stream(stream)?.asked;
        let recorded = Some((stream, position));
        *self.events.get_mut(&event).ok_or(code::INVALID_HANDLE)? = Event { recorded, ..Event::default() };
        Ok(())
    }

    /// Makes a stream wait for an event.
    pub(crate) fn wait_for(&mut self, stream: u64, event: u64) -> Result<(), i32> {
        let Event { recorded, captured, .. } = self.events.get(&event).ok_or(code::INVALID_HANDLE)?;
        let (recorded, captured, capture) = (*recorded, *captured, self.stream(stream)?.capture);
        match (captured, capture, recorded) {
            // The stream joins the capture, or waits for another stream of the same capture.
            (Some((graph, by, nodes)), None, _) => {
                self.stream(stream)?.capture = Some(graph);
                let graph = self.graphs.get_mut(&graph).ok_or(code::INVALID_HANDLE)?;
                graph.forks.insert(stream, [nodes, nodes]);
                graph.forks.entry(by).or_default()[1] = nodes;
            }
            (Some((graph, by, nodes)), Some(own), _) if graph == own => {
                let graph = self.graphs.get_mut(&graph).ok_or(code::INVALID_HANDLE)?;
                graph.forks.entry(by).or_default()[1] = nodes;
            }
            (Some((graph, ..)), Some(_), _) | (None, Some(graph), Some(_)) => {
                self.break_graph(graph);
                return Err(code::CAPTURE_ISOLATION);
            }
            (None, None, Some((other, position))) => {
                self.push(stream, Entry::Wait { stream: other, position })?
            }
            (None, _, None) => {}
        }
        Ok(())
    }

    fn recorded(&mut self, event: u64) -> Result<Option<(u64, u64)>, i32> {
        let event = self.events.get(&event).ok_or(code::INVALID_HANDLE)?;
        match event.captured {
            Some((graph, ..)) => Err(self.break_graph(graph)),
            None => Ok(event.recorded),
        }
    }

    /// Runs everything before an event.
    pub(crate) fn reach(&mut self, event: u64) -> Result<Progress, i32> {
        match self.recorded(event)? {
            Some((stream, position)) if self.streams.contains_key(&stream) => self.advance(stream, position),
            _ => Ok(Progress::Done),
        }
    }

    /// Whether an event is done. Each call runs at most one entry, so polling eventually succeeds.
    pub(crate) fn query(&mut self, event: u64) -> Result<Progress, i32> {
        self.forbid_in_captures()?;
        match self.recorded(event)? {
            Some((stream, position)) if self.stream(stream)?.done < position => {
                let next = self.stream(stream)?.done + 1;
                self.advance(stream, next)?;
                Ok(if self.stream(stream)?.done < position { Progress::Pending } else { Progress::Done })
            }
            _ => Ok(Progress::Done),
        }
    }

    /// Milliseconds between two events.
    pub(crate) fn elapsed(&self, start: u64, end: u64) -> Result<f32, i32> {
        let time = |event| self.events.get(&event).ok_or(code::INVALID_HANDLE)?.time.ok_or(code::NOT_READY);
        Ok((time(end)? - time(start)?).as_secs_f32() * 1e3)
    }

    pub(crate) fn allocate(&mut self, stream: u64, bytes: usize) -> Result<u64, i32> {
        self.ok()?;
        let capture = self.stream(stream)?.capture;
        let at = match self.memory.reserve(bytes, capture.is_some()) {
            Some(at) => at,
            None => {
                // Queued frees may not have run yet.
                self.finish(stream)?;
                self.memory.reserve(bytes, capture.is_some()).ok_or(code::OUT_OF_MEMORY)?
            }
        };
        if let Some(graph) = capture {
            self.graphs.get_mut(&graph).ok_or(code::INVALID_HANDLE)?.memory.push(at);
        }
        self.ask(stream, "allocation", Arc::new(move |memory| memory.begin(at).map(|()| Progress::Done)))?;
        Ok(at)
    }

    pub(crate) fn free(&mut self, stream: u64, at: u64) -> Result<(), i32> {
        self.ask(stream, "free", Arc::new(move |memory| memory.end(at).map(|()| Progress::Done)))
    }

    /// Fails if a capture in progress forbids this call, for this thread or for all.
    pub(crate) fn forbid_in_captures(&mut self) -> Result<(), i32> {
        const GLOBAL: u32 = 0;
        const RELAXED: u32 = 2;
        let forbids = |graph: &&mut Graph| {
            let own = |(thread, mode, _)| mode == GLOBAL || mode != RELAXED && thread == current().id();
            graph.making.is_some_and(own)
        };
        match self.graphs.values_mut().find(forbids) {
            Some(graph) => {
                graph.broken = true;
                Err(code::CAPTURE_UNSUPPORTED)
            }
            None => Ok(()),
        }
    }

    fn break_graph(&mut self, graph: u64) -> i32 {
        if let Some(graph) = self.graphs.get_mut(&graph) {
            graph.broken = true;
        }
        code::CAPTURE_UNSUPPORTED
    }

    pub(crate) fn begin_capture(&mut self, stream: u64, mode: u32) -> Result<(), i32> {
        if stream == 0 || self.stream(stream)?.capture.is_some() {
            return Err(code::CAPTURE_UNSUPPORTED);
        }
        let number = self.new_handle();
        self.graphs
            .insert(number, Graph { making: Some((current().id(), mode, stream)), ..Graph::default() });
        self.stream(stream)?.capture = Some(number);
        Ok(())
    }

    /// 0: no capture, 1: in progress, 2: invalidated.
    pub(crate) fn capture_status(&mut self, stream: u64) -> Result<u32, i32> {
        let capture = self.stream(stream)?.capture;
        Ok(capture.map_or(0, |graph| if self.graphs.get(&graph).is_some_and(|it| it.broken) { 2 } else { 1 }))
    }

    pub(crate) fn end_capture(&mut self, stream: u64) -> Result<u64, i32> {
        let number = self.stream(stream)?.capture.ok_or(code::INVALID_VALUE)?;
        self.streams.values_mut().filter(|it| it.capture == Some(number)).for_each(|it| it.capture = None);
        let graph = self.graphs.get_mut(&number).ok_or(code::INVALID_HANDLE)?;
        graph.making = None;
        let heard = |(fork, [last, heard]): (&u64, &[usize; 2])| *fork == stream || last <= heard;
        let error = match () {
            () if graph.broken => code::CAPTURE_INVALIDATED,
            () if !graph.forks.iter().all(heard) => code::CAPTURE_UNJOINED,
            () => return Ok(number),
        };
        self.drop_graph(number)?;
        Err(error)
    }

    pub(crate) fn has_graph(&self, graph: u64) -> bool {
        self.graphs.contains_key(&graph)
    }

    pub(crate) fn nodes(&self, graph: u64) -> Result<Vec<&'static str>, i32> {
        let graph = self.graphs.get(&graph).ok_or(code::INVALID_HANDLE)?;
        Ok(graph.nodes.iter().map(|(name, _)| *name).collect())
    }

    /// Queues all of a graph's work on a stream. `again` first frees memory that the previous launch left allocated.
    pub(crate) fn launch(&mut self, graph: u64, stream: u64, again: bool) -> Result<(), i32> {
        let graph = self.graphs.get(&graph).ok_or(code::INVALID_HANDLE)?;
        let (nodes, left) = (graph.nodes.clone(), graph.memory.clone());
        let free: Work = Arc::new(move |memory: &mut Memory| {
            for at in left.iter().filter(|_| again) {
                if memory.is_live(*at) {
                    memory.end(*at)?;
                }
            }
            Ok(Progress::Done)
        });
        self.ask(stream, "launch of a graph", free)?;
        nodes.into_iter().try_for_each(|(name, work)| self.ask(stream, name, work))
    }

    /// Destroys a graph. Its memory is released once all queued work is done.
    pub(crate) fn drop_graph(&mut self, graph: u64) -> Result<(), i32> {
        let graph = self.graphs.remove(&graph).ok_or(code::INVALID_HANDLE)?;
        for stream in self.streams.keys().copied().collect::<Vec<_>>() {
            if self.stream(stream)?.capture.is_none() && self.fault.is_none() {
                self.finish(stream)?;
            }
        }
        graph.memory.iter().for_each(|at| self.memory.release(*at));
        Ok(())
    }
}
