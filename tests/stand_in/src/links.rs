//! libnccl: collectives between devices of one or several processes, through the first rank.
//!
//! As with NCCL, a collective whose partner is gone never ends: the caller must check for errors, and abort it.

use crate::device::{Progress, device, owner};
use crate::driver::leaked;
use crate::memory::Memory;
use crate::numbers::{Kind, bytes, put};
use std::collections::HashMap;
use std::ffi::{c_char, c_int};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const SYSTEM_ERROR: c_int = 2;
const INVALID_ARGUMENT: c_int = 4;
const REMOTE_ERROR: c_int = 6;

/// The environment variable that may set the meeting place.
const MEETING: &str = "NCCL_COMM_ID";
const PATIENCE: Duration = Duration::from_secs(60);

/// The address of the meeting place, as zero-padded text.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Id([u8; 128]);

/// Listeners of this process, until the first rank uses them.
static PLACES: Mutex<Option<HashMap<String, TcpListener>>> = Mutex::new(None);

/// A rank's part of a communicator.
#[derive(Debug)]
pub(crate) struct Link {
    jobs: Sender<Job>,
    /// For the first rank: sockets to all others, in order. For the others: the socket to the first rank.
    sockets: Vec<TcpStream>,
    error: Arc<AtomicI32>,
    aborted: Arc<AtomicI32>,
    ranks: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum What {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
}

#[derive(Debug)]
struct Job {
    what: What,
    kind: Kind,
    own: Vec<u8>,
    done: Sender<Vec<u8>>,
}

fn answer(result: Result<(), c_int>) -> c_int {
    result.err().unwrap_or(0)
}

fn failed(error: impl std::fmt::Display) -> c_int {
    eprintln!("stand-in: NCCL: {error}");
    SYSTEM_ERROR
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclGetUniqueId(to: *mut Id) -> c_int {
    let body = || {
        let place = match std::env::var(MEETING) {
            Ok(place) => place,
            Err(_) => {
                let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
                let place = listener.local_addr().map_err(failed)?.to_string();
                let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
                places.get_or_insert_default().insert(place.clone(), listener);
                place
            }
        };
        let mut id = [0; 128];
        id.get_mut(..place.len()).ok_or(INVALID_ARGUMENT)?.copy_from_slice(place.as_bytes());
        // SAFETY: the caller passes a valid pointer.
        unsafe { crate::driver::give(to, Id(id)) }
    };
    answer(body())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommInitRank(to: *mut *const Link, ranks: c_int, id: Id, rank: c_int) -> c_int {
    let body = || {
        let text = id.0.split(|byte| *byte == 0).next().unwrap_or(&[]);
        let place = std::str::from_utf8(text).map_err(|_| INVALID_ARGUMENT)?;
        if ranks < 1 || rank < 0 || rank >= ranks {
            return Err(INVALID_ARGUMENT);
        }
        let link = Link::join(place, rank as usize, ranks as usize).map_err(failed)?;
        // SAFETY: the caller passes a valid pointer.
        unsafe { crate::driver::give(to, Arc::into_raw(Arc::new(link))) }
    };
    answer(body())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommAbort(link: *const Link) -> c_int {
    // SAFETY: made by `ncclCommInitRank`, and not used after this.
    let link = unsafe { Arc::from_raw(link) };
    link.aborted.store(1, Ordering::SeqCst);
    for socket in &link.sockets {
        let _ = socket.shutdown(Shutdown::Both); // Fails if it is gone already.
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommDestroy(link: *const Link) -> c_int {
    // SAFETY: same contract as `ncclCommAbort`.
    unsafe { ncclCommAbort(link) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommGetAsyncError(link: *const Link, to: *mut c_int) -> c_int {
    // SAFETY: made by `ncclCommInitRank`; the caller passes a valid pointer.
    unsafe { answer(crate::driver::give(to, (*link).error.load(Ordering::SeqCst))) }
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_link: *const Link) -> *const c_char {
    c"".as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(error: c_int) -> *const c_char {
    leaked(format!("the stand-in's NCCL says {error}"))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclGetVersion(to: *mut c_int) -> c_int {
    // SAFETY: the caller passes a valid pointer.
    answer(unsafe { crate::driver::give(to, 22809) })
}

macro_rules! exchanges {
    ($(fn $name:ident($($extra:ident: $type:ty),*) = $what:expr, $parts:expr;)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            from: u64, to: u64, count: usize, kind: c_int, $($extra: $type,)* link: *const Link, stream: u64,
        ) -> c_int {
            $(let _ = $extra;)*
            // SAFETY: made by `ncclCommInitRank`; the exchange owns a reference while it runs.
            let link = unsafe {
                Arc::increment_strong_count(link);
                Arc::from_raw(link)
            };
            let parts: fn(usize) -> usize = $parts;
            let len = count * parts(link.ranks);
            answer(exchange(link, $what, kind, [from, to], len, stream))
        }
    )* };
}
exchanges! {
    fn ncclAllReduce(op: c_int) = What::AllReduce, |_| 1;
    fn ncclReduceScatter(op: c_int) = What::ReduceScatter, |ranks| ranks;
    fn ncclAllGather() = What::AllGather, |_| 1;
    fn ncclBroadcast(root: c_int) = What::Broadcast, |_| 1;
}

/// Queues a collective on a stream, with `len` values of this rank.
fn exchange(
    link: Arc<Link>,
    what: What,
    kind: c_int,
    [from, to]: [u64; 2],
    len: usize,
    stream: u64,
) -> Result<(), c_int> {
    let kind = match kind {
        0 | 1 => Kind::U8,
        6 => Kind::F16,
        7 => Kind::F32,
        8 => Kind::F64,
        9 => Kind::BF16,
        _ => return Err(INVALID_ARGUMENT),
    };
    let waiting: Mutex<Option<Receiver<Vec<u8>>>> = Mutex::new(None);
    let work = move |memory: &mut Memory| {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.is_none() {
            let (done, result) = channel();
            let own = bytes(memory, from, len * kind.bytes())?;
            // Fails if the link's thread is gone; then no result will come.
            let _ = link.jobs.send(Job { what, kind, own, done });
            *waiting = Some(result);
        }
        let result = waiting.as_ref().map(Receiver::try_recv);
        match result {
            Some(Ok(result)) => {
                *waiting = None;
                put(memory, to, &result)?;
                Ok(Progress::Done)
            }
            // Aborted: the output is undefined.
            _ if link.aborted.load(Ordering::SeqCst) == 1 => Ok(Progress::Done),
            Some(Err(TryRecvError::Empty | TryRecvError::Disconnected)) | None => Ok(Progress::Pending),
        }
    };
    device(owner(stream))?.ask(stream, "exchange", Arc::new(work))
}

impl Link {
    fn join(place: &str, rank: usize, ranks: usize) -> std::io::Result<Link> {
        let sockets = if rank == 0 { first(place, ranks)? } else { vec![another(place, rank)?] };
        let (jobs, list) = channel::<Job>();
        let (error, aborted) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicI32::new(0)));
        let mut own = sockets.iter().map(TcpStream::try_clone).collect::<Result<Vec<_>, _>>()?;
        let seen = error.clone();
        std::thread::spawn(move || {
            for job in list {
                let result = if rank == 0 { lead(&job, &mut own) } else { follow(&job, &mut own[0]) };
                match result {
                    // Sending fails if nobody waits any more.
                    Ok(result) => _ = job.done.send(result),
                    Err(error) => {
                        eprintln!("stand-in: NCCL, rank {rank}: {error}");
                        seen.store(REMOTE_ERROR, Ordering::SeqCst);
                        return;
                    }
                }
            }
        });
        Ok(Link { jobs, sockets, error, aborted, ranks })
    }
}

/// The first rank accepts connections from all others.
fn first(place: &str, ranks: usize) -> std::io::Result<Vec<TcpStream>> {
    let known = PLACES.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().remove(place);
    let listener = known.map_or_else(|| TcpListener::bind(place), Ok)?;
    let mut sockets: Vec<Option<TcpStream>> = (1..ranks).map(|_| None).collect();
    for _ in 1..ranks {
        let (mut socket, _) = listener.accept()?;
        socket.set_nodelay(true)?;
        let mut rank = [0; 4];
        socket.read_exact(&mut rank)?;
        if let Some(free) = sockets.get_mut((u32::from_le_bytes(rank) as usize).wrapping_sub(1)) {
            *free = Some(socket);
        }
    }
    let mut all = Vec::new();
    for socket in sockets {
        let mut socket = socket.ok_or_else(|| std::io::Error::other("a rank came twice"))?;
        socket.write_all(&[1])?;
        all.push(socket);
    }
    Ok(all)
}

fn another(place: &str, rank: usize) -> std::io::Result<TcpStream> {
    let since = Instant::now();
    let mut socket = loop {
        match TcpStream::connect(place) {
            Ok(socket) => break socket,
            Err(error) if since.elapsed() > PATIENCE => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    socket.set_nodelay(true)?;
    socket.write_all(&(rank as u32).to_le_bytes())?;
    // Wait until all ranks are connected.
    socket.read_exact(&mut [0])?;
    Ok(socket)
}

/// Sends operation, type and length; then the bytes.
fn send(socket: &mut TcpStream, job: &Job, bytes: &[u8]) -> std::io::Result<()> {
    socket.write_all(&[job.what as u8, job.kind as u8])?;
    socket.write_all(&(bytes.len() as u64).to_le_bytes())?;
    socket.write_all(bytes)
}

fn receive(socket: &mut TcpStream, job: &Job) -> std::io::Result<Vec<u8>> {
    let (mut head, mut len) = ([0; 2], [0; 8]);
    socket.read_exact(&mut head)?;
    socket.read_exact(&mut len)?;
    let mut bytes = vec![0; u64::from_le_bytes(len) as usize];
    socket.read_exact(&mut bytes)?;
    if head != [job.what as u8, job.kind as u8] {
        return Err(std::io::Error::other("ranks exchange different things"));
    }
    Ok(bytes)
}

fn follow(job: &Job, socket: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    send(socket, job, &job.own)?;
    receive(socket, job)
}

/// The first rank collects the data of all ranks, and sends each rank its result.
fn lead(job: &Job, sockets: &mut [TcpStream]) -> std::io::Result<Vec<u8>> {
    let mut all = vec![job.own.clone()];
    for socket in sockets.iter_mut() {
        let bytes = receive(socket, job)?;
        if bytes.len() != job.own.len() {
            return Err(std::io::Error::other("ranks exchange different lengths"));
        }
        all.push(bytes);
    }
    let sum = || {
        let mut values = all.iter().map(|bytes| job.kind.all(bytes));
        let first = values.next().unwrap_or_default();
        let sum = values.fold(first, |sum, other| sum.iter().zip(&other).map(|(a, b)| a + b).collect());
        job.kind.bytes_of(&sum)
    };
    let result = match job.what {
        What::AllReduce | What::ReduceScatter => sum(),
        What::AllGather => all.concat(),
        What::Broadcast => job.own.clone(),
    };
    let part = |rank: usize| match job.what {
        What::ReduceScatter => {
            let len = result.len() / all.len();
            &result[rank * len..(rank + 1) * len]
        }
        _ => &result[..],
    };
    for (socket, rank) in sockets.iter_mut().zip(1..) {
        send(socket, job, part(rank))?;
    }
    Ok(part(0).to_vec())
}
