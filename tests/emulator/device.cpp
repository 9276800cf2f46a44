// The twin of device.cu: no GPU, and no code for one.
#include "device.h"

#include <stdexcept>

namespace nsru {

int toolkit_version() { return 0; }

DeviceReport device_report() { return {0, 0, {}, "emulated: kernels run on the CPU"}; }

int kernel_image() { throw std::runtime_error("emulated: there is no code for a GPU"); }

}  // namespace nsru
