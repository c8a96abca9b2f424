//! Tests of the stand-in's strictness.
#![allow(clippy::unwrap_used)]

use crate::device::{Device, Progress, Work, code, device};
use crate::memory::Memory;
use crate::numbers::{Kind, read, write};
use crate::ptx::{Grid, Module, run};
use std::sync::Arc;

/// Runs a kernel with parameters (a u64, n u32) on these numbers, in blocks of 64 threads.
fn numbers_after(body: &str, mut numbers: Vec<f64>) -> Result<Vec<f64>, String> {
    let text = format!(
        ".version 9.0\n.target sm_90\n.address_size 64\n.visible .entry kernel(.param .u64 a, .param .u32 n)\n{{ {body} }}\n"
    );
    let kernel = Module::new(&text, |_| Err("no variables".into())).unwrap().kernel("kernel").unwrap()?;
    let mut memory = Memory::new(1 << 20);
    let at = memory.reserve(4 * numbers.len(), false).unwrap();
    memory.begin(at)?;
    write(&mut memory, at, &numbers, Kind::F32)?;
    let len = numbers.len() as u32;
    let parameters = [at.to_le_bytes().to_vec(), len.to_le_bytes().to_vec(), vec![0; 4]].concat();
    let grid = Grid { blocks: [len.div_ceil(64), 1, 1], threads: [64, 1, 1], shared: 0 };
    run(&kernel, grid, &parameters, &memory)?;
    numbers = read(&memory, at, numbers.len(), Kind::F32)?;
    Ok(numbers)
}

/// Loads a[i] into %f1; %rd1 is its address.
const LOAD: &str = "
    .reg .pred %p<4>; .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<9>;
    ld.param.u64 %rd0, [a]; ld.param.u32 %r0, [n];
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
    mad.lo.s32 %r4, %r1, %r2, %r3;
    setp.ge.u32 %p0, %r4, %r0;
    mul.wide.u32 %rd2, %r4, 4; add.s64 %rd1, %rd0, %rd2;";

fn count(n: usize) -> Vec<f64> {
    (0..n).map(|i| i as f64).collect()
}

#[test]
fn kernels_compute() {
    let body = format!(
        "{LOAD} @%p0 bra $END; ld.global.f32 %f1, [%rd1];
         fma.rn.f32 %f2, %f1, 0f40000000, 0fBF800000; st.global.f32 [%rd1], %f2; $END: ret;"
    );
    let expected: Vec<f64> = count(100).iter().map(|x| 2. * x - 1.).collect();
    assert_eq!(numbers_after(&body, count(100)).unwrap(), expected);
}

#[test]
fn threads_wait_for_each_other_where_they_say_so_alone() {
    // Each thread reads the value that its neighbor has put into shared memory.
    let body = |barrier: &str| {
        format!(
            ".shared .align 4 .b8 shared[256]; {LOAD} ld.global.f32 %f1, [%rd1]; mov.u32 %r5, shared;
             mad.lo.s32 %r6, %r3, 4, %r5; st.shared.f32 [%r6], %f1; {barrier}
             xor.b32 %r7, %r3, 1; mad.lo.s32 %r8, %r7, 4, %r5; ld.shared.f32 %f2, [%r8]; st.global.f32 [%rd1], %f2; ret;"
        )
    };
    let expected: Vec<f64> = (0..64).map(|i| f64::from(i ^ 1)).collect();
    assert_eq!(numbers_after(&body("bar.sync 0;"), count(64)).unwrap(), expected);
    assert_ne!(numbers_after(&body(""), count(64)).unwrap(), expected);
}

#[test]
fn lanes_exchange_values() {
    // The sum over a warp's 32 lanes.
    let add = |by: u32| {
        format!(
            "shfl.sync.bfly.b32 %r5|%p1, %r6, {by}, 31, -1; mov.b32 %f2, %r5; add.f32 %f1, %f1, %f2; mov.b32 %r6, %f1;"
        )
    };
    let all: String = [16, 8, 4, 2, 1].map(add).concat();
    let body =
        format!("{LOAD} ld.global.f32 %f1, [%rd1]; mov.b32 %r6, %f1; {all} st.global.f32 [%rd1], %f1; ret;");
    let sums = numbers_after(&body, count(64)).unwrap();
    assert!(sums[..32].iter().all(|x| *x == 496.) && sums[32..].iter().all(|x| *x == 1520.), "{sums:?}");
}

#[test]
fn what_is_not_allocated_is_an_error_that_names_the_place() {
    let beyond = format!("{LOAD} ld.global.f32 %f1, [%rd1+4]; ret;");
    let error = numbers_after(&beyond, count(64)).unwrap_err();
    assert!(error.contains("kernel, block [0, 0, 0]: thread [63, 0, 0]: ld.global.f32"), "{error}");
    assert!(error.contains("256 bytes into an allocation of 256"), "{error}");
    let crooked = format!("{LOAD} ld.global.f32 %f1, [%rd1+2]; ret;");
    assert!(numbers_after(&crooked, count(64)).unwrap_err().contains("no multiple"));
    let unknown = format!("{LOAD} wgmma.fence.sync.aligned; ret;");
    assert!(numbers_after(&unknown, count(64)).unwrap_err().contains("not known to the stand-in"));
}

/// Runs a test with a device, two of its streams, and the address of a number in its memory. Each test uses
/// its own device.
fn with_streams(ordinal: usize, test: impl FnOnce(&mut Device, [u64; 2], u64)) {
    let mut device = device(ordinal).unwrap();
    let streams = [device.new_stream(), device.new_stream()];
    let at = device.allocate(streams[0], 4).unwrap();
    assert_eq!(device.finish(streams[0]), Ok(Progress::Done));
    test(&mut device, streams, at);
    device.free(streams[0], at).unwrap();
    assert_eq!(device.finish(streams[0]), Ok(Progress::Done));
}

fn put(at: u64, value: f64) -> Work {
    Arc::new(move |memory| write(memory, at, &[value], Kind::F32).map(|()| Progress::Done))
}

fn add(at: u64, value: f64) -> Work {
    Arc::new(move |memory| {
        let old = read(memory, at, 1, Kind::F32)?[0];
        write(memory, at, &[old + value], Kind::F32).map(|()| Progress::Done)
    })
}

fn value(device: &Device, at: u64) -> f64 {
    read(&device.memory, at, 1, Kind::F32).unwrap()[0]
}

#[test]
fn streams_run_when_they_are_waited_for_and_not_before() {
    with_streams(0, |device, [first, second], at| {
        assert!(value(device, at).is_nan(), "fresh memory is of no meaning");
        device.ask(first, "put", put(at, 1.)).unwrap();
        let event = device.new_event();
        device.record(event, first).unwrap();
        // Without waiting for the event, the second stream would run first.
        device.wait_for(second, event).unwrap();
        device.ask(second, "add", add(at, 1.)).unwrap();
        assert!(value(device, at).is_nan());
        assert_eq!(device.finish(second), Ok(Progress::Done));
        assert_eq!(value(device, at), 2.);
    });
}

#[test]
fn graphs_do_again_what_was_recorded_and_refuse_what_cannot_be() {
    with_streams(1, |device, [first, second], at| {
        device.ask(first, "put", put(at, 0.)).unwrap();
        assert_eq!(device.finish(first), Ok(Progress::Done));
        const THREAD_LOCAL: u32 = 1;
        device.begin_capture(first, THREAD_LOCAL).unwrap();
        let inner = device.allocate(first, 4).unwrap();
        device.ask(first, "put", put(inner, 5.)).unwrap();
        device.ask(first, "add", add(at, 1.)).unwrap();
        device.free(first, inner).unwrap();
        let graph = device.end_capture(first).unwrap();
        assert_eq!(value(device, at), 0., "recording does nothing");
        for expected in [1., 2.] {
            device.launch(graph, first, false).unwrap();
            assert_eq!(device.finish(first), Ok(Progress::Done));
            assert_eq!(value(device, at), expected);
        }
        device.drop_graph(graph).unwrap();
        // Waiting for the device invalidates a capture, and so does a stream that joined it and was never
        // waited for.
        device.begin_capture(first, THREAD_LOCAL).unwrap();
        assert_eq!(device.finish(first), Err(code::CAPTURE_UNSUPPORTED));
        assert_eq!(device.end_capture(first), Err(code::CAPTURE_INVALIDATED));
        device.begin_capture(first, THREAD_LOCAL).unwrap();
        let event = device.new_event();
        device.record(event, first).unwrap();
        device.wait_for(second, event).unwrap();
        device.ask(second, "add", add(at, 1.)).unwrap();
        assert_eq!(device.end_capture(first), Err(code::CAPTURE_UNJOINED));
    });
}

#[test]
fn halves_are_rounded_once() {
    // Just above the midpoint between two halves: the dropped bits decide.
    for (x, expected) in [(1. + 1. / 256., 1.), (1. + 1. / 256. + f64::from(f32::EPSILON), 1. + 1. / 128.)] {
        assert_eq!(Kind::BF16.all(&Kind::BF16.bytes_of(&[x])), [expected]);
    }
    let tiny = 1. + 1. / 2048. + 1e-12;
    assert_eq!(Kind::F16.all(&Kind::F16.bytes_of(&[tiny])), [1. + 1. / 1024.]);
}
