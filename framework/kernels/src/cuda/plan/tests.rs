//! Plans by the real cuDNN for devices that need not be present: it gets their descriptions, and plans
//! without executing.
//!
//! `CANDLEPOWER_TEST_CUDNN=1` declares that cuDNN, 9.11 or later, can be loaded.

use super::*;
use crate::cuda::backend::Attribute;
use crate::cuda::memory::ALIGNMENT;
use candle_core::cuda_backend::cudarc::cudnn::sys::cudnnBackendAttributeType_t as Type;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

// SAFETY: these are one-byte characters.
unsafe impl Attribute for u8 {
    const TYPE: Type = Type::CUDNN_TYPE_CHAR;
}

/// Properties that differ between devices.
struct Known {
    name: &'static str,
    /// Compute capability x.y as 100 x + 10 y.
    version: u32,
    /// Multiprocessors, and the blocks and threads that each holds at once.
    processors: [u32; 3],
    /// Maximum shared memory of a block, in KiB.
    shared: u32,
    /// Memory in GiB.
    memory: u64,
    /// L2 cache in MiB.
    cache: u32,
}

impl Known {
    const fn new(
        name: &'static str,
        version: u32,
        processors: [u32; 3],
        shared: u32,
        memory: u64,
        cache: u32,
    ) -> Self {
        Self { name, version, processors, shared, memory, cache }
    }

    fn target(&self) -> Target {
        let Known { name, version, processors: [processors, blocks, threads], shared, memory, cache } = self;
        let (shared, memory, cache) = (shared << 10, memory << 30, cache << 20);
        let description = format!(
            r#"{{"deviceName": "{name}", "deviceVer": {version}, "driverVer": 13000, "cudaDeviceId": 0, "pciDeviceId": 0,
            "multiProcessorCount": {processors}, "smCountOrigin": 0, "smClockRateKHz": 1700000, "memClockRateKHz": 2600000,
            "totalGlobalMem": {memory}, "l2CacheSize": {cache}, "maxSharedMemoryPerBlock": 49152,
            "maxSharedMemoryPerBlockOptin": {shared}, "reservedSharedMemoryPerBlock": 1024, "oversizedSharedMemoryPerBlock": 0,
            "regsPerBlock": 65536, "maxRegistersPerSM": 65536, "maxGridSize": [2147483647, 65535, 65535],
            "maxBlockSize": [1024, 1024, 64], "maxThreadsPerBlock": 1024, "maxThreadsPerSM": {threads},
            "maxCtasPerSM": {blocks}, "warpSize": 32, "isTccDriver": 0, "supportCoopLaunch": 1}}"#
        );
        let told = Descriptor::new(Kind::CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR).and_then(|it| {
            it.with(Name::CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, description.as_bytes())?.finish()
        });
        Target::Described(told.unwrap())
    }

    /// Whether the device computes in this dtype.
    fn has(&self, dtype: DType) -> bool {
        dtype != DType::BF16 || self.version >= 800
    }
}

const T4: Known = Known::new("Tesla T4", 750, [40, 16, 1024], 64, 16, 4);
const A100: Known = Known::new("NVIDIA A100-SXM4-80GB", 800, [108, 32, 2048], 163, 80, 40);
const L4: Known = Known::new("NVIDIA L4", 890, [58, 24, 1536], 99, 24, 48);
const H200: Known = Known::new("NVIDIA H200", 900, [132, 32, 2048], 227, 140, 60);
const B200: Known = Known::new("NVIDIA B200", 1000, [148, 32, 2048], 227, 180, 126);

/// Whether cuDNN is available; prints a message if not.
fn is_here() -> bool {
    let is_here = std::env::var_os("CANDLEPOWER_TEST_CUDNN").is_some();
    if !is_here {
        eprintln!("SKIPPED: CANDLEPOWER_TEST_CUDNN does not say that cuDNN is here");
    }
    is_here
}

const PASSES: [Pass; 3] = [Pass::Forward, Pass::BackwardData, Pass::BackwardFilter];

/// A key for well-aligned memory.
fn key(g: Geometry, pass: Pass, dtype: DType) -> Key {
    Key { g, pass, add: false, dtype, alignments: [ALIGNMENT; 3], tf32: false }
}

/// The plans with all allowed engines.
fn all(target: &Target, key: &Key) -> Vec<Plan> {
    let next = |last: &Plan| Plan::new(target, key, last.number).ok();
    std::iter::successors(Plan::new(target, key, 0).ok(), next).collect()
}

/// cuDNN's notes on a plan's engine.
fn notes_of(plan: &Plan) -> Vec<Note> {
    let config = Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG;
    notes(&plan.execution.get_part(config, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR).unwrap()).unwrap()
}

/// cuDNN's notes on the engines that it proposes first, allowed or not.
fn proposed(target: &Target, key: &Key) -> Vec<Vec<Note>> {
    let parts = operation(key).unwrap();
    let graph = target.graph(&parts[0]).unwrap();
    let engines = target.engines(&graph, Mode::CUDNN_HEUR_MODE_A).unwrap();
    engines.iter().map(|config| notes(config).unwrap()).collect()
}

#[test]
fn half_precision_runs_on_tensor_cores_by_the_engine_that_comes_first() {
    if !is_here() {
        return;
    }
    // The tutorial's layers, with 16 and 64 samples: at later steps, and where x of the first step has 64
    // channels; then the weight gradients over nine steps.
    let steps =
        [16, 64].map(|batch| [64, 72, 128].map(|inputs| Geometry::of_3x3(batch, 64, inputs, 256))).concat();
    let all_steps =
        [144, 576].map(|batch| [72, 128].map(|inputs| Geometry::of_3x3(batch, 64, inputs, 256))).concat();
    for device in [T4, A100, L4, H200, B200] {
        let target = device.target();
        for dtype in [DType::BF16, DType::F16].into_iter().filter(|dtype| device.has(*dtype)) {
            let of_steps = steps.iter().flat_map(|g| PASSES.map(|pass| key(*g, pass, dtype)));
            let of_all_steps = all_steps.iter().map(|g| key(*g, Pass::BackwardFilter, dtype));
            for key in of_steps.chain(of_all_steps) {
                let plan = Plan::new(&target, &key, 0).unwrap();
                let (what, first) = (format!("{}: {key:?}", device.name), &proposed(&target, &key)[0]);
                assert!(key.allows(first) && first.contains(&Note::TENSOR_CORE), "{what}: {first:?}");
                assert_eq!((plan.number, &notes_of(&plan)), (1, first), "{what}");
                assert!(plan.workspace <= 64 << 20, "{what}: {} bytes", plan.workspace);
            }
        }
    }
}

#[test]
fn engines_that_are_not_allowed_are_passed_over() {
    if !is_here() {
        return;
    }
    let (target, mut is_any_loose) = (H200.target(), false);
    for pass in PASSES {
        let whole = key(Geometry::of_3x3(16, 64, 128, 256), pass, DType::F32);
        let with_tf32 = Key { tf32: true, ..whole };
        let bf16 = Key { dtype: DType::BF16, ..whole };
        let has = |plans: &[Plan], note| plans.iter().any(|plan| notes_of(plan).contains(&note));
        let [of_whole, of_tf32, of_bf16] = [whole, with_tf32, bf16].map(|key| all(&target, &key));
        assert!(!of_whole.is_empty() && !has(&of_whole, Note::TENSOR_CORE), "{pass:?}");
        assert!(has(&of_tf32[..1], Note::TENSOR_CORE) && of_tf32.len() > of_whole.len(), "{pass:?}");
        for plans in [of_whole, of_tf32, of_bf16] {
            assert!(
                !has(&plans, Note::NONDETERMINISTIC) && !has(&plans, Note::DOWN_CONVERT_INPUTS),
                "{pass:?}"
            );
            // Each plan uses a different engine.
            assert!(plans.iter().map(|plan| plan.number).eq(1..=plans.len()), "{pass:?}");
        }
        is_any_loose |= proposed(&target, &whole).iter().any(|notes| notes.contains(&Note::NONDETERMINISTIC));
    }
    assert!(is_any_loose, "nothing was there to be passed over");
}

#[test]
fn the_plainest_engine_comes_last_unless_cudnn_puts_it_first() {
    if !is_here() {
        return;
    }
    let target = H200.target();
    let indices = |key: &Key| -> Vec<i64> {
        let config = Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG;
        let kind = Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR;
        let of = |plan: &Plan| index(&plan.execution.get_part(config, kind).unwrap()).unwrap();
        all(&target, key).iter().map(of).collect()
    };
    // The weight gradient of the tutorial's last layer sums over all pixels of 160 frames.
    let narrow = Geometry { outputs: 1, ..Geometry::of_3x3(160, 64, 64, 64) };
    let [first, .., last] = indices(&key(narrow, Pass::BackwardFilter, DType::F32))[..] else {
        panic!("there is no choice")
    };
    assert!(first != 0 && last == 0, "{first}, {last}");
    let depthwise = Geometry { groups: 512, ..Geometry::of_3x3(16, 16, 512, 512) };
    let [first, ..] = indices(&key(depthwise, Pass::Forward, DType::F32))[..] else { panic!("none") };
    assert_eq!(first, 0);
}

#[test]
fn a_step_that_is_as_large_as_a_call_may_be_is_planned() {
    if !is_here() {
        return;
    }
    let target = H200.target();
    // 2^30 gate values, also if the gradient is added to existing values.
    for add in [false, true] {
        for pass in PASSES {
            let key = Key { add, ..key(Geometry::of_3x3(1024, 64, 128, 256), pass, DType::BF16) };
            assert!(
                Plan::new(&target, &key, 0).is_ok_and(|plan| plan.workspace <= MOST_WORKSPACE),
                "{key:?}"
            );
        }
    }
}

#[test]
fn plans_are_handed_places_with_and_without_workspace() {
    if is_here() {
        assert!([0, 64].iter().all(|workspace| variant_pack([16, 32, 48], *workspace).is_ok()));
    }
}

prop_compose! {
    fn any_geometry()(
        (batch, groups) in (1usize..200, 1usize..9),
        (group_inputs, group_outputs) in (1usize..200, 1usize..200),
        (height, width) in (1usize..130, 1usize..130),
        (kernel_height, kernel_width) in (1usize..12, 1usize..12),
        (stride, padding, dilation) in (1usize..5, 0usize..8, 1usize..4),
        depthwise: bool,
    ) -> Option<Geometry> {
        let of_group = |channels: usize| if depthwise { groups * 16 } else { groups * channels };
        let out = |size: usize, kernel: usize| {
            Some((size + 2 * padding).checked_sub(dilation * (kernel - 1) + 1)? / stride + 1)
        };
        Some(Geometry {
            batch, height, width, kernel_height, kernel_width, stride, padding, dilation,
            inputs: of_group(group_inputs),
            outputs: of_group(group_outputs),
            groups: if depthwise { groups * 16 } else { groups },
            out_height: out(height, kernel_height)?,
            out_width: out(width, kernel_width)?,
        })
    }
}

#[test]
fn every_convolution_has_an_engine() {
    if !is_here() {
        return;
    }
    let has_engines = |(g, alignments, add): (Geometry, [u64; 3], bool)| {
        for device in [T4, A100, L4, H200, B200] {
            let target = device.target();
            for dtype in [DType::F32, DType::BF16, DType::F16].into_iter().filter(|dtype| device.has(*dtype))
            {
                for pass in PASSES {
                    let key = Key { alignments, add, ..key(g, pass, dtype) };
                    if let Err(why) = Plan::new(&target, &key, 0) {
                        return Err(TestCaseError::fail(format!("{}: {key:?}: {why}", device.name)));
                    }
                }
            }
        }
        Ok(())
    };
    let geometries = any_geometry().prop_filter_map("the kernel is larger than the image", |g| g);
    let alignments = prop::array::uniform3(prop::sample::select(vec![4u64, 8, ALIGNMENT]));
    let config = ProptestConfig { failure_persistence: None, ..Default::default() };
    TestRunner::new(config).run(&(geometries, alignments, any::<bool>()), has_engines).unwrap();
}
