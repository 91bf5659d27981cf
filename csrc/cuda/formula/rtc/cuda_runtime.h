// NVRTC declares what this header has by itself.
#pragma once
