// What this machine's GPUs are and whether this module's code runs on them. No torch, no pybind11.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace nsru {

struct Device {
    std::string name;
    int major;
    int minor;
    int multiprocessors;
    int shared_bytes_per_block_optin;
    int l2_bytes;
    size_t memory_bytes;
};

struct DeviceReport {
    int runtime_version;  // 13000 is 13.0
    int driver_version;   // newest CUDA the driver serves; 0 without a driver
    std::vector<Device> devices;
    std::string reason;  // why `devices` is empty; "" when it is not
};

// CUDA version of the headers this module was compiled with; 13000 is 13.0.
int toolkit_version();

// Creates no CUDA context. Throws std::runtime_error naming the call, the code and its meaning.
DeviceReport device_report();

// SM version of the code that the current device would run (80, 90, ...). Creates the device's
// context. Throws std::runtime_error where the module holds no code for the device.
int kernel_image();

}  // namespace nsru
