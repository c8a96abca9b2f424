//! Loads the library as a program does.
#![cfg(target_os = "linux")]

use std::ffi::{CStr, CString, c_int, c_void};
use std::path::PathBuf;

/// The library's path: Cargo builds it next to this test.
fn library() -> PathBuf {
    let test = std::env::current_exe().expect("this test has a path");
    test.with_file_name("libcandlepower_stand_in.so")
}

#[test]
fn it_counts_its_devices_and_has_the_names_of_all_libraries() {
    let path = CString::new(library().to_string_lossy().into_owned()).expect("a path without zeros");
    // SAFETY: a zero-terminated path; loading the library has no side effects.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "{path:?} does not open");
    let find = |name: &CStr| {
        // SAFETY: an open library, and a zero-terminated name.
        let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
        assert!(!found.is_null(), "there is no {name:?}");
        found
    };
    for name in [
        c"cuLaunchKernel",
        c"cudnnConvolutionForward",
        c"cublasGemmStridedBatchedEx",
        c"curandGenerateUniform",
    ] {
        find(name);
    }
    find(c"ncclAllReduce");
    // SAFETY: the function has this signature.
    let count = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_int) -> c_int>(find(
            c"cuDeviceGetCount",
        ))
    };
    let mut devices = 0;
    // SAFETY: a valid pointer for the result.
    assert_eq!(unsafe { count(&mut devices) }, 0);
    assert_eq!(devices, 2);
}
